"""sites/ffn"""
