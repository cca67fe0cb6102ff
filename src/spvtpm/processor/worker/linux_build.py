"""Builds `_linux`: the few Linux calls that Python lacks, checked by the C compiler. Needs libseccomp's headers."""

from __future__ import annotations

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    #define CLONE_NEWNS ...
    #define CLONE_NEWIPC ...
    #define CLONE_NEWUSER ...
    #define CLONE_NEWPID ...
    #define CLONE_NEWNET ...
    #define MS_RDONLY ...
    #define MS_NOSUID ...
    #define MS_NODEV ...
    #define MS_NOEXEC ...
    #define MS_REMOUNT ...
    #define MS_REC ...
    #define MS_PRIVATE ...
    #define MNT_DETACH ...
    #define PR_SET_DUMPABLE ...
    #define PR_SET_NO_NEW_PRIVS ...
    #define PR_SET_PDEATHSIG ...
    #define MCL_CURRENT ...
    #define MCL_FUTURE ...
    #define MCL_ONFAULT ...
    #define SCMP_ACT_ALLOW ...
    #define SCMP_ACT_KILL_PROCESS ...

    int unshare(int flags);
    int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
    int umount2(const char *target, int flags);
    int mlockall(int flags);
    int linux_prctl(int option, unsigned long argument);
    int linux_drop_capabilities(void);
    int linux_pivot_root(const char *new_root, const char *put_old);
    int linux_landlock_abi(void);
    int linux_landlock_restrict(uint64_t fs, uint64_t net, uint64_t scoped);
    int linux_seccomp_load(const void *program, size_t size);

    uint32_t linux_act_errno(uint32_t number);
    typedef void *scmp_filter_ctx;
    enum scmp_compare { SCMP_CMP_NE, SCMP_CMP_LT, SCMP_CMP_LE, SCMP_CMP_EQ, SCMP_CMP_GE, SCMP_CMP_GT,
                        SCMP_CMP_MASKED_EQ, ... };
    struct scmp_arg_cmp { unsigned int arg; enum scmp_compare op; uint64_t datum_a; uint64_t datum_b; ...; };
    scmp_filter_ctx seccomp_init(uint32_t def_action);
    void seccomp_release(scmp_filter_ctx ctx);
    int seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int arg_cnt,
                               const struct scmp_arg_cmp *arg_array);
    enum scmp_filter_attr { SCMP_FLTATR_ACT_BADARCH, ... };
    int seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attribute, uint32_t value);
    int seccomp_syscall_resolve_name(const char *name);
    int seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);
    """
)

ffibuilder.set_source(
    "spvtpm.processor.worker._linux",
    r"""
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <linux/capability.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>
    #include <sched.h>
    #include <seccomp.h>
    #include <stdint.h>
    #include <sys/mman.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The running kernel may know more of Landlock than the headers of the building machine: numbers and layout
       are fixed by the kernel's user-space interface. Source: linux/landlock.h, landlock(7). */
    #define CREATE_RULESET 444
    #define RESTRICT_SELF 446
    #define CREATE_RULESET_VERSION 1

    struct ruleset_attributes { uint64_t fs, net, scoped; };

    static int linux_prctl(int option, unsigned long argument) {
        return prctl(option, argument, 0UL, 0UL, 0UL);
    }

    static int linux_drop_capabilities(void) {
        struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3, .pid = 0 };
        struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = { { 0, 0, 0 }, { 0, 0, 0 } };
        return (int)syscall(SYS_capset, &header, none);
    }

    static int linux_pivot_root(const char *new_root, const char *put_old) {
        return (int)syscall(SYS_pivot_root, new_root, put_old);
    }

    static int linux_landlock_abi(void) {
        return (int)syscall(CREATE_RULESET, NULL, (size_t)0, CREATE_RULESET_VERSION);
    }

    static int linux_landlock_restrict(uint64_t fs, uint64_t net, uint64_t scoped) {
        struct ruleset_attributes attributes = { fs, net, scoped };
        /* Kernels that do not know the later fields take a larger structure if those are zero. */
        int ruleset = (int)syscall(CREATE_RULESET, &attributes, sizeof attributes, 0);
        if (ruleset < 0)
            return -1;
        int result = (int)syscall(RESTRICT_SELF, ruleset, 0);
        int error = errno;
        close(ruleset);
        errno = error;
        return result;
    }

    static int linux_seccomp_load(const void *program, size_t size) {
        struct sock_fprog filter = {
            .len = (unsigned short)(size / sizeof(struct sock_filter)),
            .filter = (struct sock_filter *)program,
        };
        return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);
    }

    static uint32_t linux_act_errno(uint32_t number) {
        return SCMP_ACT_ERRNO(number);
    }
    """,
    libraries=["seccomp"],
)
