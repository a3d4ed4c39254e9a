"""Fast inference for `reward.scorer`: shared prefixes, packed texts and layers that use less memory bandwidth."""
