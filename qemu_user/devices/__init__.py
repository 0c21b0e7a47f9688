"""The devices of the machine, a file each. catalogue.py lists them."""
