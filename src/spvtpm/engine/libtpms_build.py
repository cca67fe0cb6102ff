"""Compiles the thin C layer between Python and libtpms; read by the package's build, imported by nothing at run time.

Everything that libtpms asks on every command (locality, physical presence, "is there state to load?") is answered in
C, so that the compiler checks the callbacks against libtpms' own header and no Python runs on the way to a response.
Python is called back for one thing only: a changed permanent state.
"""

from __future__ import annotations

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    /* libtpms/tpm_library.h */
    typedef uint32_t TPM_RESULT;
    enum TPMLIB_StateType { TPMLIB_STATE_PERMANENT, TPMLIB_STATE_VOLATILE, ... };

    uint32_t TPMLIB_GetVersion(void);
    TPM_RESULT TPMLIB_MainInit(void);
    void TPMLIB_Terminate(void);
    TPM_RESULT TPMLIB_CancelCommand(void);
    uint32_t TPMLIB_SetBufferSize(uint32_t wanted_size, uint32_t *min_size, uint32_t *max_size);
    TPM_RESULT TPMLIB_SetState(enum TPMLIB_StateType st, const unsigned char *buffer, uint32_t buflen);
    TPM_RESULT TPMLIB_GetState(enum TPMLIB_StateType st, unsigned char **buffer, uint32_t *buflen);
    void TPM_Free(unsigned char *buffer);

    /* ours, below */
    #define ENGINE_BUFFER_SIZE ...
    #define ENGINE_BUSY ...
    #define ENGINE_TOO_LONG ...
    #define ENGINE_NOT_STORED ...
    #define ENGINE_CLOSED ...

    extern uint32_t engine_locality;
    extern bool engine_store_failed;
    extern uint32_t engine_stores;

    TPM_RESULT engine_prepare(void);
    bool engine_enter(void);
    void engine_leave(void);
    int64_t engine_process(const unsigned char *command, uint32_t command_size, unsigned char *response);
    void engine_allow_manufacture(bool allowed);
    void engine_forget_cached_state(void);
    bool engine_has_profiles(void);
    TPM_RESULT engine_set_profile(const char *profile);

    extern "Python" bool engine_on_permanent_state(const unsigned char *data, uint32_t length);
    """
)

ffibuilder.set_source(
    "spvtpm.engine._libtpms",
    r"""
    #include <limits.h>
    #include <stdbool.h>
    #include <stdint.h>
    #include <string.h>

    #include <libtpms/tpm_library.h>
    #include <libtpms/tpm_error.h>
    #include <libtpms/tpm_memory.h>

    /* TPM_BUFFER_MAX of libtpms 0.9 and 0.10: the largest command, and the largest response. */
    #define ENGINE_BUFFER_SIZE 4096

    /* Results of engine_process() that are not libtpms' own (those are negated TPM_RESULTs, of 32 bits). */
    #define ENGINE_BUSY       (-0x100000001LL)
    #define ENGINE_TOO_LONG   (-0x100000002LL)
    #define ENGINE_NOT_STORED (-0x100000003LL)
    #define ENGINE_CLOSED     (-0x100000004LL)

    static uint32_t engine_locality;
    static bool engine_may_manufacture;
    static bool engine_store_failed;
    static uint32_t engine_stores;
    static bool engine_is_entered;
    static unsigned char *engine_newborn;
    static uint32_t engine_newborn_size;

    /* New in libtpms 0.10. Weak: null on an older library, whichever header this was compiled with. */
    extern TPM_RESULT TPMLIB_SetProfile(const char *profile) __attribute__((weak));

    static bool engine_on_permanent_state(const unsigned char *data, uint32_t length);

    static TPM_RESULT engine_succeed(void)
    {
        return TPM_SUCCESS;
    }

    /* TPM_RETRY means "there is none yet", upon which libtpms manufactures a new TPM without a word. State to resume
       comes in through TPMLIB_SetState() alone, so this says so only while a manufacture was asked for. Having made
       and stored the new state, TPMLIB_MainInit() asks for it again; told "none" a second time, it would go on with
       all-zero memory: a TPM with known seeds. */
    static TPM_RESULT engine_load(unsigned char **data, uint32_t *length, uint32_t tpm_number, const char *name)
    {
        TPM_RESULT result;

        (void)tpm_number;
        *data = NULL;
        *length = 0;
        if (strcmp(name, "volatilestate") == 0)
            return TPM_RETRY;
        if (!engine_may_manufacture)
            return TPM_FAIL;
        if (engine_newborn == NULL)
            return TPM_RETRY;
        result = TPM_Malloc(data, engine_newborn_size);
        if (result == TPM_SUCCESS) {
            memcpy(*data, engine_newborn, engine_newborn_size);
            *length = engine_newborn_size;
        }
        return result;
    }

    static bool engine_keep_newborn(const unsigned char *data, uint32_t length)
    {
        if (TPM_Realloc(&engine_newborn, length) != TPM_SUCCESS)
            return false;
        memcpy(engine_newborn, data, length);
        engine_newborn_size = length;
        return true;
    }

    static void engine_allow_manufacture(bool allowed)
    {
        if (engine_newborn != NULL)
            explicit_bzero(engine_newborn, engine_newborn_size);
        TPM_Free(engine_newborn);
        engine_newborn = NULL;
        engine_may_manufacture = allowed;
    }

    static TPM_RESULT engine_store(const unsigned char *data, uint32_t length, uint32_t tpm_number, const char *name)
    {
        if (tpm_number != 0 || strcmp(name, "permall") != 0
            || (engine_may_manufacture && !engine_keep_newborn(data, length))
            || !engine_on_permanent_state(data, length)) {
            engine_store_failed = true;
            return TPM_FAIL;
        }
        engine_stores++;
        return TPM_SUCCESS;
    }

    /* TPM 2.0 never deletes a state by name. */
    static TPM_RESULT engine_delete(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
    {
        (void)tpm_number; (void)name; (void)must_exist;
        return TPM_FAIL;
    }

    static TPM_RESULT engine_get_locality(TPM_MODIFIER_INDICATOR *locality, uint32_t tpm_number)
    {
        (void)tpm_number;
        *locality = engine_locality;
        return TPM_SUCCESS;
    }

    static TPM_RESULT engine_get_physical_presence(TPM_BOOL *physical_presence, uint32_t tpm_number)
    {
        (void)tpm_number;
        *physical_presence = 0;
        return TPM_SUCCESS;
    }

    static TPM_RESULT engine_prepare(void)
    {
        struct libtpms_callbacks callbacks = {
            .sizeOfStruct = sizeof(struct libtpms_callbacks),
            .tpm_nvram_init = engine_succeed,
            .tpm_nvram_loaddata = engine_load,
            .tpm_nvram_storedata = engine_store,
            .tpm_nvram_deletename = engine_delete,
            .tpm_io_init = engine_succeed,
            .tpm_io_getlocality = engine_get_locality,
            .tpm_io_getphysicalpresence = engine_get_physical_presence,
        };
        TPM_RESULT result = TPMLIB_ChooseTPMVersion(TPMLIB_TPM_VERSION_2);
        if (result != TPM_SUCCESS)
            return result;
        /* On entering failure mode libtpms prints the command, secrets and all, to stderr, or to this descriptor:
           one that cannot exist, so nothing is written and nothing needs to be kept open. */
        TPMLIB_SetDebugFD(INT_MAX);
        TPMLIB_SetDebugLevel(0);
        return TPMLIB_RegisterCallbacks(&callbacks);
    }

    /* libtpms is one set of globals without a lock: whoever wants in while another is in is turned away. */
    static bool engine_enter(void)
    {
        return !__atomic_test_and_set(&engine_is_entered, __ATOMIC_ACQUIRE);
    }

    static void engine_leave(void)
    {
        __atomic_clear(&engine_is_entered, __ATOMIC_RELEASE);
    }

    /* The number of response bytes, or a negative number. The command is copied first: libtpms decrypts parameters
       in place, and what it is given here is an immutable Python object. */
    static int64_t engine_process(const unsigned char *command, uint32_t command_size, unsigned char *response)
    {
        static unsigned char own_command[ENGINE_BUFFER_SIZE];
        static unsigned char *own_response;
        static uint32_t own_response_capacity;
        uint32_t response_size = 0;
        int64_t result;

        if (response == NULL)
            return ENGINE_CLOSED;
        if (command_size > ENGINE_BUFFER_SIZE)
            return ENGINE_TOO_LONG;
        if (!engine_enter())
            return ENGINE_BUSY;
        memcpy(own_command, command, command_size);
        engine_store_failed = false;
        result = -(int64_t)TPMLIB_Process(&own_response, &response_size, &own_response_capacity, own_command,
                                          command_size);
        if (engine_store_failed)
            result = ENGINE_NOT_STORED;
        else if (result == 0 && response_size > ENGINE_BUFFER_SIZE)
            result = -(int64_t)TPM_SIZE;
        else if (result == 0) {
            memcpy(response, own_response, response_size);
            result = response_size;
        }
        engine_leave();
        return result;
    }

    /* SetState(NULL) would not do: it caches "an empty state". A refused SetState() drops all that is cached, and one
       of the save state, which a TPM 2.0 has not, is always refused. */
    static void engine_forget_cached_state(void)
    {
        (void)TPMLIB_SetState(TPMLIB_STATE_SAVE_STATE, (const unsigned char *)"", 1);
    }

    static bool engine_has_profiles(void)
    {
        return TPMLIB_SetProfile != NULL;
    }

    static TPM_RESULT engine_set_profile(const char *profile)
    {
        return TPMLIB_SetProfile != NULL ? TPMLIB_SetProfile(profile) : TPM_FAIL;
    }
    """,
    libraries=["tpms"],
    extra_compile_args=["-Werror=incompatible-pointer-types", "-Werror=int-conversion"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir="src", verbose=True)
