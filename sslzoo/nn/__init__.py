"""Building blocks of methods: backbones, heads, batch norms, queues, momentum encoders, per-sample state."""
