"""ops/linear"""
