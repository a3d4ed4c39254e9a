"""Chat with a policy. The meta-prompt can change at any time, and each answer is scored by tier."""
