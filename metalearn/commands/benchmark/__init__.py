"""``metalearn benchmark``: compare speed with other libraries, and measure engines, float32, sweeps and scaling."""
