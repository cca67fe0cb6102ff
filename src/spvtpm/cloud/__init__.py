"""The cloud platform: a web service that places VMs, has them run, and relays what it cannot read. Nobody trusts it."""
