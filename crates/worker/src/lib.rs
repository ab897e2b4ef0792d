//! The agent of a machine, and the engine processes that hold backbones.
