/* Companions: their names, finding them, and reading them. */
#include "qemu.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* The parts of the name, between colons: prefix, hashes of target, guest, disk and the disk's name,
 * size, ID. */
#define PREFIX "pba-id:"
#define ID_DIGITS 32

enum { PART_PREFIX, PART_TARGET, PART_GUEST, PART_DISK, PART_NAME, PART_SIZE, PART_ID, PART_COUNT };

static bool is_id(const char *text)
{
    return strlen(text) == ID_DIGITS && strspn(text, "0123456789abcdef") == ID_DIGITS;
}

bool pba_companion_check_id(const char *id, GError **error)
{
    if (id && is_id(id)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "'%s' is not the ID of a backup - must be %d hexadecimal digits in lower case",
                  id ? id : "", ID_DIGITS);
    return false;
}

char *pba_companion_name(const PbaCompanion *companion)
{
    g_autofree char *target = pba_short_hash(companion->target_id);
    g_autofree char *guest = pba_short_hash(companion->guest);
    g_autofree char *disk = pba_short_hash(companion->disk);
    g_autofree char *name = pba_short_hash(companion->name ? companion->name : "");

    return g_strdup_printf(PREFIX "%s:%s:%s:%s:%" G_GUINT64_FORMAT ":%s", target, guest, disk, name,
                           companion->size, companion->id ? companion->id : "");
}

bool pba_is_companion(const char *bitmap)
{
    return g_str_has_prefix(bitmap, PREFIX);
}

bool pba_is_companion_of(const char *bitmap, const char *target_id)
{
    g_autofree char *target = pba_short_hash(target_id);
    g_autofree char *prefix = g_strconcat(PREFIX, target, ":", NULL);

    return g_str_has_prefix(bitmap, prefix);
}

const char *pba_companion_id(const char *bitmap)
{
    const char *last = pba_is_companion(bitmap) ? strrchr(bitmap, ':') : NULL;

    return last && is_id(last + 1) ? last + 1 : NULL;
}

bool pba_companion_is_named(const char *bitmap, const char *name)
{
    g_autofree char *expected = pba_short_hash(name);
    g_auto(GStrv) parts = g_strsplit(bitmap, ":", PART_COUNT);

    return g_strv_length(parts) == PART_COUNT && strcmp(parts[PART_NAME], expected) == 0;
}

const char *pba_companion_find(const PbaBlock *block, const char *node, const char *target_id)
{
    PbaBitmapWalk at = pba_bitmaps_of(block, node);
    const char *found = NULL;

    while (pba_bitmaps_next(&at)) {
        if (!pba_is_companion_of(at.name, target_id)) {
            continue;
        }
        if (found) {
            return NULL; /* it is unknown which of them is right */
        }
        found = at.name;
    }
    return found;
}

/* There is no companion, it has no ID yet, or it is unknown which of several is right. */
static const char no_backup[] = "the bitmap is not known to be relative to a backup that succeeded";

/* Why the state of a bitmap makes it unusable; NULL if it does not. */
static const char *state_problem(JsonObject *info, bool recording)
{
    if (!info) {
        return "the bitmap does not exist any more";
    }
    if (pba_json_find_bool(info, "inconsistent")) {
        return "QEMU did not store the bitmap when it ended";
    }
    if (pba_json_find_bool(info, "recording") != recording) {
        return recording ? "the bitmap has stopped recording"
                         : "the bitmap's companion was changed";
    }
    return NULL;
}

static bool lacks_bits(JsonObject *info, uint64_t size)
{
    uint64_t count;

    return !pba_json_size(info, "count", &count, NULL) || count < size;
}

/* How a companion's name differs from the wanted one. */
static char *name_problem(const char *name, const PbaCompanion *wanted)
{
    g_autofree char *expected = pba_companion_name(wanted);
    g_auto(GStrv) is = g_strsplit(name, ":", PART_COUNT);
    g_auto(GStrv) want = g_strsplit(expected, ":", PART_COUNT);

    if (g_strv_length(is) != PART_COUNT) {
        return g_strdup("the bitmap's companion has an invalid name");
    }
    if (strcmp(is[PART_GUEST], want[PART_GUEST]) != 0) {
        return g_strdup("the bitmap belongs to another guest");
    }
    if (strcmp(is[PART_DISK], want[PART_DISK]) != 0) {
        return g_strdup("the bitmap belongs to another disk");
    }
    if (!is_id(is[PART_ID])) {
        return g_strdup(no_backup);
    }
    if (!wanted->id) {
        return g_strdup("there is no backup that the bitmap could be relative to");
    }
    if (strcmp(is[PART_ID], want[PART_ID]) != 0) {
        return g_strdup_printf("the bitmap is relative to backup %s, not %s", is[PART_ID],
                               want[PART_ID]);
    }
    if (wanted->name && strcmp(is[PART_NAME], want[PART_NAME]) != 0) {
        return g_strdup("the disk was backed up under another name");
    }
    return strcmp(is[PART_SIZE], want[PART_SIZE]) != 0 ? g_strdup("the disk was resized") : NULL;
}

char *pba_companion_problem(const PbaBlock *block, const char *node, const char *bitmap,
                            const PbaCompanion *wanted)
{
    const char *name = pba_companion_find(block, node, wanted->target_id);
    const char *problem = state_problem(pba_block_find_bitmap(block, node, bitmap), true);

    if (problem) {
        return g_strdup(problem);
    }
    if (!name) {
        return g_strdup(no_backup);
    }
    JsonObject *info = pba_block_find_bitmap(block, node, name);
    char *difference = name_problem(name, wanted);
    if (difference) {
        return difference;
    }
    problem = state_problem(info, false);
    return problem                          ? g_strdup(problem)
           : lacks_bits(info, wanted->size) ? g_strdup("the disk was resized")
                                            : NULL;
}

void pba_companion_remove(JsonArray *actions, const PbaBlock *block, const char *node,
                          const char *target_id)
{
    PbaBitmapWalk at = pba_bitmaps_of(block, node);

    while (pba_bitmaps_next(&at)) {
        if (pba_is_companion_of(at.name, target_id)) {
            pba_actions_add_ref(actions, "block-dirty-bitmap-remove", node, at.name);
        }
    }
}

void pba_companion_add(JsonArray *actions, const char *node, const char *name, const char *from,
                       uint64_t granularity, bool persistent)
{
    JsonNode *add = pba_json("{'node': <%s>, 'name': <%s>, 'granularity': <%t>}", node, name,
                             (guint64)granularity);

    pba_json_set_if(add, "disabled", true);
    pba_json_set_if(add, "persistent", persistent);
    pba_actions_add(actions, "block-dirty-bitmap-add", add);
    pba_actions_add_merge(actions, node, name, from);
}

/* The second one belongs to QEMU's own backups if backup-access-setup has its early form. */
static const char *const proxmox_bitmaps[] = {PBA_PVE_BACKGROUND, "pbs-incremental-dirty-bitmap",
                                              NULL};

bool pba_is_reserved_bitmap(const char *name)
{
    return pba_is_tied_bitmap(name) || pba_is_companion(name) || pba_audit_key(name) ||
           pba_background_target(name) || g_strv_contains(proxmox_bitmaps, name);
}
