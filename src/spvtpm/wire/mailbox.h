/* Frames in VM memory: keys, header, sealing, opening. Shared by both ends and by the tests: there is no other
   implementation. The format and its rules are described in mailbox.py.

   Nothing here reads memory that somebody else can change: callers copy a frame out first. Cryptography is OpenSSL's
   (AES-256-GCM, HKDF-SHA-256); this only calls it. */

#ifndef SPVTPM_MAILBOX_H
#define SPVTPM_MAILBOX_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

enum {
    MAILBOX_KEY_BYTES = 32,
    MAILBOX_NONCE_BYTES = 32,
    MAILBOX_ID_BYTES = 16,
    MAILBOX_HEADER_BYTES = 64,
    MAILBOX_TAG_BYTES = 16,
    MAILBOX_OVERHEAD_BYTES = MAILBOX_HEADER_BYTES + MAILBOX_TAG_BYTES,
    MAILBOX_MAX_PAYLOAD_BYTES = 4096,
    MAILBOX_MAX_FRAME_BYTES = MAILBOX_OVERHEAD_BYTES + MAILBOX_MAX_PAYLOAD_BYTES,
    MAILBOX_VERSION = 1,
    MAILBOX_IV_BYTES = 12,
};

#define MAILBOX_MAX_SEQUENCE INT64_MAX

enum mailbox_direction { MAILBOX_COMMAND = 1, MAILBOX_RESPONSE = 2 };

enum mailbox_result {
    MAILBOX_OK,
    MAILBOX_NO_ROOM,        /* fewer bytes than the shortest frame */
    MAILBOX_NO_FRAME,       /* not this format, version or direction, or reserved bits are set */
    MAILBOX_BAD_SEQUENCE,   /* zero, or above MAILBOX_MAX_SEQUENCE */
    MAILBOX_BAD_SIZE,       /* empty, too long, or cut off */
    MAILBOX_OTHER_PLACE,    /* made for another address or session */
    MAILBOX_NOT_AUTHENTIC,
    MAILBOX_CRYPTO_FAILED,  /* OpenSSL has no memory, or is broken */
};

/* As it lies in memory, little-endian. */
struct mailbox_wire_header {
    uint8_t magic[4];
    uint8_t version;
    uint8_t direction;
    uint16_t flags;
    uint32_t payload_bytes;
    uint32_t reserved;
    uint64_t sequence;
    uint64_t address;
    uint8_t vm_nonce[MAILBOX_NONCE_BYTES];
};
_Static_assert(sizeof(struct mailbox_wire_header) == MAILBOX_HEADER_BYTES, "the header has no padding");

struct mailbox_header {
    uint32_t payload_bytes;
    uint64_t sequence;
    uint64_t address;
    uint8_t vm_nonce[MAILBOX_NONCE_BYTES];
};

struct mailbox_session {
    uint8_t keys[2][MAILBOX_KEY_BYTES]; /* of commands, of responses */
    uint8_t vm_nonce[MAILBOX_NONCE_BYTES];
    EVP_CIPHER_CTX *ciphers[2];
};

static const uint8_t mailbox_magic[4] = {'S', 'P', 'V', 'M'};
static const char mailbox_boot_label[] = "spvtpm mailbox boot key v1";
static const char mailbox_session_label[] = "spvtpm mailbox session keys v1";

/* HKDF with SHA-256. Source: RFC 5869; OpenSSL, EVP_KDF-HKDF(7). */
static bool mailbox_hkdf(const uint8_t *key, const void *salt, size_t salt_bytes, const void *info, size_t info_bytes,
                         uint8_t *out, size_t out_bytes)
{
    static EVP_KDF *kdf; /* found once, before any fork: finding it may read files */
    EVP_KDF_CTX *context;
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)key, MAILBOX_KEY_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *)salt, salt_bytes),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)info, info_bytes),
        OSSL_PARAM_construct_end(),
    };
    bool done;

    if (kdf == NULL)
        kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    context = kdf != NULL ? EVP_KDF_CTX_new(kdf) : NULL;
    done = context != NULL && EVP_KDF_derive(context, out, out_bytes, parameters) == 1;
    EVP_KDF_CTX_free(context);
    return done;
}

static bool mailbox_derive_boot_key(const uint8_t vm_key[MAILBOX_KEY_BYTES], const uint8_t vm_id[MAILBOX_ID_BYTES],
                                    const uint8_t boot_id[MAILBOX_ID_BYTES], uint8_t boot_key[MAILBOX_KEY_BYTES])
{
    uint8_t info[sizeof mailbox_boot_label - 1 + MAILBOX_ID_BYTES];

    memcpy(info, mailbox_boot_label, sizeof mailbox_boot_label - 1);
    memcpy(info + sizeof mailbox_boot_label - 1, vm_id, MAILBOX_ID_BYTES);
    return mailbox_hkdf(vm_key, boot_id, MAILBOX_ID_BYTES, info, sizeof info, boot_key, MAILBOX_KEY_BYTES);
}

static void mailbox_session_close(struct mailbox_session *session)
{
    EVP_CIPHER_CTX_free(session->ciphers[0]);
    EVP_CIPHER_CTX_free(session->ciphers[1]);
    OPENSSL_cleanse(session, sizeof *session);
}

/* Opens a session with keys that are known. It holds nothing when this fails. */
static bool mailbox_session_open(struct mailbox_session *session, const uint8_t keys[2][MAILBOX_KEY_BYTES],
                                 const uint8_t vm_nonce[MAILBOX_NONCE_BYTES])
{
    static EVP_CIPHER *cipher; /* as above */

    memset(session, 0, sizeof *session);
    if (cipher == NULL)
        cipher = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    memcpy(session->keys, keys, sizeof session->keys);
    memcpy(session->vm_nonce, vm_nonce, sizeof session->vm_nonce);
    for (int way = 0; way < 2; way++) {
        session->ciphers[way] = EVP_CIPHER_CTX_new();
        if (cipher == NULL || session->ciphers[way] == NULL
            || EVP_CipherInit_ex(session->ciphers[way], cipher, NULL, session->keys[way], NULL, 1) != 1) {
            mailbox_session_close(session);
            return false;
        }
    }
    return true;
}

/* Opens the session to which the SP contributed `sp_nonce` and the VM `vm_nonce`. */
static bool mailbox_session_derive(struct mailbox_session *session, const uint8_t boot_key[MAILBOX_KEY_BYTES],
                                   const uint8_t sp_nonce[MAILBOX_NONCE_BYTES],
                                   const uint8_t vm_nonce[MAILBOX_NONCE_BYTES])
{
    uint8_t salt[2 * MAILBOX_NONCE_BYTES];
    uint8_t keys[2][MAILBOX_KEY_BYTES];
    bool done;

    memcpy(salt, sp_nonce, MAILBOX_NONCE_BYTES);
    memcpy(salt + MAILBOX_NONCE_BYTES, vm_nonce, MAILBOX_NONCE_BYTES);
    done = mailbox_hkdf(boot_key, salt, sizeof salt, mailbox_session_label, sizeof mailbox_session_label - 1, keys[0],
                        sizeof keys)
           && mailbox_session_open(session, keys, vm_nonce);
    OPENSSL_cleanse(keys, sizeof keys);
    return done;
}

/* Reads the header of a frame of which `room` bytes are there, and checks its bounds. */
static enum mailbox_result mailbox_parse(const uint8_t *frame, size_t room, enum mailbox_direction direction,
                                         struct mailbox_header *header)
{
    struct mailbox_wire_header wire;

    if (room < MAILBOX_OVERHEAD_BYTES)
        return MAILBOX_NO_ROOM;
    memcpy(&wire, frame, sizeof wire);
    if (memcmp(wire.magic, mailbox_magic, sizeof wire.magic) != 0 || wire.version != MAILBOX_VERSION
        || wire.direction != direction || wire.flags != 0 || wire.reserved != 0)
        return MAILBOX_NO_FRAME;
    header->payload_bytes = le32toh(wire.payload_bytes);
    header->sequence = le64toh(wire.sequence);
    header->address = le64toh(wire.address);
    memcpy(header->vm_nonce, wire.vm_nonce, sizeof header->vm_nonce);
    if (header->sequence == 0 || header->sequence > MAILBOX_MAX_SEQUENCE)
        return MAILBOX_BAD_SEQUENCE;
    if (header->payload_bytes == 0 || header->payload_bytes > MAILBOX_MAX_PAYLOAD_BYTES
        || header->payload_bytes > room - MAILBOX_OVERHEAD_BYTES)
        return MAILBOX_BAD_SIZE;
    return MAILBOX_OK;
}

static void mailbox_iv(uint64_t sequence, uint8_t iv[MAILBOX_IV_BYTES])
{
    uint64_t big = htobe64(sequence);

    memset(iv, 0, MAILBOX_IV_BYTES - sizeof big);
    memcpy(iv + MAILBOX_IV_BYTES - sizeof big, &big, sizeof big);
}

/* Writes the frame that carries `payload` to `frame`, which has room for MAILBOX_OVERHEAD_BYTES more than the payload.
   The caller never uses a sequence twice in one direction of one session. */
static enum mailbox_result mailbox_seal(struct mailbox_session *session, enum mailbox_direction direction,
                                        uint64_t sequence, uint64_t address, const uint8_t *payload, uint32_t size,
                                        uint8_t *frame)
{
    EVP_CIPHER_CTX *cipher = session->ciphers[direction - 1];
    struct mailbox_wire_header wire = {
        .version = MAILBOX_VERSION,
        .direction = direction,
        .payload_bytes = htole32(size),
        .sequence = htole64(sequence),
        .address = htole64(address),
    };
    uint8_t iv[MAILBOX_IV_BYTES];
    int written;

    if (size == 0 || size > MAILBOX_MAX_PAYLOAD_BYTES)
        return MAILBOX_BAD_SIZE;
    memcpy(wire.magic, mailbox_magic, sizeof wire.magic);
    memcpy(wire.vm_nonce, session->vm_nonce, sizeof wire.vm_nonce);
    memcpy(frame, &wire, sizeof wire);
    mailbox_iv(sequence, iv);
    if (EVP_CipherInit_ex(cipher, NULL, NULL, NULL, iv, 1) != 1
        || EVP_CipherUpdate(cipher, NULL, &written, frame, MAILBOX_HEADER_BYTES) != 1
        || EVP_CipherUpdate(cipher, frame + MAILBOX_HEADER_BYTES, &written, payload, (int)size) != 1
        || EVP_CipherFinal_ex(cipher, frame + MAILBOX_HEADER_BYTES + size, &written) != 1
        || EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_GET_TAG, MAILBOX_TAG_BYTES, frame + MAILBOX_HEADER_BYTES + size)
               != 1)
        return MAILBOX_CRYPTO_FAILED;
    return MAILBOX_OK;
}

/* Opens a frame that lay at `address`; `header` is what mailbox_parse() made of this same copy. `payload` has room for
   header->payload_bytes; it holds nothing to be used unless the result is MAILBOX_OK. */
static enum mailbox_result mailbox_open(struct mailbox_session *session, enum mailbox_direction direction,
                                        const struct mailbox_header *header, uint64_t address, const uint8_t *frame,
                                        uint8_t *payload)
{
    EVP_CIPHER_CTX *cipher = session->ciphers[direction - 1];
    const uint8_t *sealed = frame + MAILBOX_HEADER_BYTES;
    uint8_t iv[MAILBOX_IV_BYTES];
    int written;

    if (header->address != address || memcmp(header->vm_nonce, session->vm_nonce, MAILBOX_NONCE_BYTES) != 0)
        return MAILBOX_OTHER_PLACE;
    mailbox_iv(header->sequence, iv);
    if (EVP_CipherInit_ex(cipher, NULL, NULL, NULL, iv, 0) != 1
        || EVP_CipherUpdate(cipher, NULL, &written, frame, MAILBOX_HEADER_BYTES) != 1
        || EVP_CipherUpdate(cipher, payload, &written, sealed, (int)header->payload_bytes) != 1
        || EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_SET_TAG, MAILBOX_TAG_BYTES,
                               (void *)(sealed + header->payload_bytes))
               != 1)
        return MAILBOX_CRYPTO_FAILED;
    if (EVP_CipherFinal_ex(cipher, payload + header->payload_bytes, &written) != 1) {
        OPENSSL_cleanse(payload, header->payload_bytes);
        return MAILBOX_NOT_AUTHENTIC;
    }
    return MAILBOX_OK;
}

#endif
