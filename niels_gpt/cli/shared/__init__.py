"""What commands share: the modules of the folder above are commands, each of them."""
