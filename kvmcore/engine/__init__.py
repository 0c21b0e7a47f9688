"""Running guest code natively: the image of threaded handlers, its loader, and the Machine and Hart that use it."""
