"""XFuse: histology and spot counts fused into super-resolved expression (under construction)."""
