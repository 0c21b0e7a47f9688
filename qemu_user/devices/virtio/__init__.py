"""The virtio devices, a file each, and what they have in common. catalogue.py lists them."""
