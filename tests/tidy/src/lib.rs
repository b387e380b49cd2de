//! Tests that hold the shape of the tree; nothing here is code of the product.
