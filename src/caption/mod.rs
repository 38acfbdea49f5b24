//! caption
