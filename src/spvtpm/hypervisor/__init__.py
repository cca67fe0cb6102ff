"""The hypervisor's side: untrusted, holds no key. May import `wire`, nothing else of ours."""
