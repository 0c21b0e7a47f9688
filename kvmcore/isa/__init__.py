"""What the guest CPU means: instructions, CSRs, traps, page tables, IEEE 754. Description, over ir.value."""
