"""Code shared by commands. (Every module in the folder above is a command.)"""
