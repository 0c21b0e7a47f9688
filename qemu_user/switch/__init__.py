"""The virtual switch: `softkvm switch`. A process of its own that VMs, taps and other switches are plugged into."""
