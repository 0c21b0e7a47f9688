"""Device processes that need not import anything: forked from a parent that has done so (parent.py), for a command that is as
light as it can be (front.py), or for a VM in the background (process.py).
"""
