"""What to do when KVM_RUN comes back: one file per exit reason, the table in run_loop.py."""
