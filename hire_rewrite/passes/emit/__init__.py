"""passes/emit"""
