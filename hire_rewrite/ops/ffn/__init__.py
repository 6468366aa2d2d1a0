"""ops/ffn"""
