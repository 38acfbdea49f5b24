//! consume
