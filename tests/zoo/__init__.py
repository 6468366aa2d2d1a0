"""Models written with the libraries that people use, at tiny sizes."""
