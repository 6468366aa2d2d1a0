"""The greatest of many values, on one device or several."""
