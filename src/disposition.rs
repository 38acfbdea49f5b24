//! disposition
