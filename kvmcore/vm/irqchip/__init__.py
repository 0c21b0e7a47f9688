"""The in-kernel interrupt controller: AIA (aia.py), its APLIC and IMSICs, and the GSI routing table."""
