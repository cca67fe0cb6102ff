"""The process that runs one vTPM: forked from a warm zygote, sandboxed before it sees a guest's byte."""
