//! Jobs, backbones and checkpoints of a cluster.
