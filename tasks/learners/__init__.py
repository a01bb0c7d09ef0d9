"""Downstream classifiers that learn session by session, all behind one protocol (``base.Learner``)."""
