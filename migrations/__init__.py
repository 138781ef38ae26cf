"""The revisions of the store, and the code that brings a store to one of them."""
