"""The episodic trainer: meta-steps, update rules, metrics, faults, resume, launch."""
