"""What this box is: devices, memory that can really be used, peak rates, and the environment JAX wants here."""
