"""sites/head"""
