/* Names of what we add to a QEMU: nodes, exports, jobs, bitmaps. */
#include "qemu.h"
#include "src/base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#define TARGET_PREFIX "pba:"
#define BACKGROUND_PREFIX "pba-background-"
/* For a bitmap with a companion: the name must show which of the two bitmaps it belongs to. */
#define TIED_BACKGROUND_PREFIX "pba-background+"
/* The prefix in version 0.1.0. */
#define OLD_BACKGROUND_PREFIX "pba-background:"
#define AUDIT_PREFIX "pba-audit:"

bool pba_is_own_node(const char *node)
{
    return g_str_has_prefix(node, PBA_OWN_PREFIX);
}

char *pba_short_hash(const char *text)
{
    g_autofree char *hash = g_compute_checksum_for_string(G_CHECKSUM_SHA256, text, -1);
    return g_strndup(hash, PBA_HASH_LENGTH);
}

char *pba_own_name(const char *target_id, const char *role, const char *of)
{
    g_autofree char *prefix = pba_target_prefix(target_id, role);
    g_autofree char *hash = pba_short_hash(of);
    return g_strconcat(prefix, hash, NULL);
}

char *pba_key_name(const char *target_id, const char *role, const char *key)
{
    g_autofree char *prefix = pba_target_prefix(target_id, role);
    return g_strconcat(prefix, key, NULL);
}

char *pba_target_prefix(const char *target_id, const char *role)
{
    g_autofree char *target = pba_short_hash(target_id);
    return g_strdup_printf("pba-%s-%s-", role, target);
}

char *pba_target_bitmap(const char *target_id)
{
    return g_strconcat(TARGET_PREFIX, target_id, NULL);
}

char *pba_tied_bitmap(const char *target_id)
{
    return g_strconcat(PBA_TIED_PREFIX, target_id, NULL);
}

bool pba_is_tied_bitmap(const char *name)
{
    return g_str_has_prefix(name, PBA_TIED_PREFIX);
}

/* Version 0.1.0 does not know this name: it finds the target's bitmap frozen and alone, and makes a
 * full backup. */
char *pba_background_bitmap(const char *target_id, const char *nonce, bool tied)
{
    return nonce ? g_strconcat(tied ? TIED_BACKGROUND_PREFIX : BACKGROUND_PREFIX, nonce, ":",
                               target_id, NULL)
                 : g_strconcat(OLD_BACKGROUND_PREFIX, target_id, NULL);
}

/* The part of the name after the nonce. */
static const char *skip_nonce(const char *name, const char *prefix)
{
    const char *nonce = name + strlen(prefix);
    size_t length = strspn(nonce, "0123456789abcdef");

    return length == PBA_NONCE_LENGTH && nonce[length] == ':' ? nonce + length + 1 : NULL;
}

const char *pba_background_target(const char *name)
{
    if (g_str_has_prefix(name, OLD_BACKGROUND_PREFIX)) {
        return name + strlen(OLD_BACKGROUND_PREFIX);
    }
    if (pba_is_tied_background(name)) {
        return skip_nonce(name, TIED_BACKGROUND_PREFIX);
    }
    return g_str_has_prefix(name, BACKGROUND_PREFIX) ? skip_nonce(name, BACKGROUND_PREFIX) : NULL;
}

bool pba_is_tied_background(const char *name)
{
    return g_str_has_prefix(name, TIED_BACKGROUND_PREFIX);
}

/* Gets the random bytes from the kernel, because GLib's generator gives a forked child the same
 * numbers as its parent. */
char *pba_nonce_new(GError **error)
{
    uint64_t number;

    if (getentropy(&number, sizeof(number)) != 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot get random numbers from the kernel - %s",
                      g_strerror(errno));
        return NULL;
    }
    return g_strdup_printf("%0*" PRIx64, PBA_NONCE_LENGTH, number);
}

char *pba_export_id(const char *target_id, const char *nonce, const char *key)
{
    g_autofree char *target = pba_short_hash(target_id);
    return g_strconcat(PBA_EXPORT_PREFIX, nonce, "-", target, "-", key, NULL);
}

char *pba_ending_prefix(const char *target_id)
{
    g_autofree char *target = pba_short_hash(target_id);
    return g_strconcat(PBA_ENDING_PREFIX, target, NULL);
}

/* Node names have at most 31 bytes, so only a part of the nonce fits. A name pba-ending-TARGET-...
 * would be mistaken for that of a disk's node. */
char *pba_ending_mark(const char *target_id, const char *nonce)
{
    g_autofree char *prefix = pba_ending_prefix(target_id);
    return g_strdup_printf("%s.%.*s", prefix, PBA_HASH_LENGTH, nonce);
}

const char *pba_bitmap_target(const char *name)
{
    if (pba_is_tied_bitmap(name)) {
        return name + strlen(PBA_TIED_PREFIX);
    }
    return g_str_has_prefix(name, TARGET_PREFIX) ? name + strlen(TARGET_PREFIX)
                                                 : pba_background_target(name);
}

/* Contains the target's hash, as companions do, because a target-id may have the full 1023 bytes of
 * a bitmap's name. */
char *pba_audit_bitmap(const char *target_id, const char *nonce)
{
    g_autofree char *target = pba_short_hash(target_id);
    return g_strconcat(AUDIT_PREFIX, target, ":", nonce, NULL);
}

const char *pba_audit_key(const char *name)
{
    return g_str_has_prefix(name, AUDIT_PREFIX) ? name + strlen(AUDIT_PREFIX) : NULL;
}

bool pba_is_audit_of(const char *name, const char *target_id)
{
    g_autofree char *prefix = pba_audit_bitmap(target_id, "");
    return g_str_has_prefix(name, prefix);
}
