"""ops/head"""
