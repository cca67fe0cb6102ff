"""The words between the trust domains: messages, framing, formats, register layouts, error codes. Imports nothing of ours."""
