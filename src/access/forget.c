/* Removes a target's bitmaps. An earlier state of the guest cannot be loaded while a disk has a
 * bitmap. */
#include "backend.h"
#include "leftovers.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* An access of a dead process, or by QEMU's own commands. Live processes of ours have refused our
 * marker. */
static bool check_down(const PbaAccess *access, const PbaLeftovers *leftovers, GError **error)
{
    g_autoptr(GPtrArray) things = pba_leftovers_list(leftovers);
    bool is_up = access->backend->is_access_up(leftovers->block);

    for (guint i = 0; i < things->len; i++) {
        const PbaLeftover *thing = things->pdata[i];
        is_up |= !thing->harmless;
    }
    if (is_up) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup of this guest not finished: its bitmaps are in use - wait "
                      "for it, or call recover if its process is gone");
    }
    return !is_up;
}

static bool is_targets(const PbaAccess *access, const char *bitmap)
{
    return pba_is_companion_of(bitmap, access->target_id) ||
           pba_is_audit_of(bitmap, access->target_id) ||
           g_strcmp0(access->backend->bitmap_target(bitmap), access->target_id) == 0;
}

/* A companion or an audit's copy, which is removed together with the target's bitmap. */
static bool is_beside(const PbaAccess *access, const PbaBlock *block, const PbaBitmapWalk *at)
{
    PbaBitmapWalk other = pba_bitmaps_of(block, at->node);
    bool has_target = false;

    while (pba_bitmaps_next(&other)) {
        has_target |= g_strcmp0(access->backend->bitmap_target(other.name), access->target_id) == 0;
    }
    return has_target && (pba_is_companion(at->name) || pba_audit_key(at->name));
}

static char *line_of(const PbaBlock *block, const PbaBitmapWalk *at)
{
    g_autofree char *device = pba_block_device_above(block, at->node);

    return pba_block_is_sealed(block, at->node, at->info)
               ? pba_line("node %s: bitmap '%s' stays, since its image is read-only now", at->node,
                          at->name)
               : pba_line("device %s: bitmap '%s' was removed: the next backup is a full one",
                          device ? device : at->node, at->name);
}

static void find_bitmaps(const PbaAccess *access, const PbaBlock *block, JsonArray *actions,
                         GPtrArray *lines)
{
    PbaBitmapWalk at = pba_bitmaps_everywhere(block);

    while (pba_bitmaps_next(&at)) {
        if (!is_targets(access, at.name)) {
            continue;
        }
        if (!pba_block_is_sealed(block, at.node, at.info)) {
            pba_actions_add_ref(actions, "block-dirty-bitmap-remove", at.node, at.name);
        }
        if (!is_beside(access, block, &at)) {
            g_ptr_array_add(lines, line_of(block, &at));
        }
    }
}

/* While our marker is in QEMU, no process begins an access, which would need the bitmaps. */
static bool forget_marked(PbaAccess *access, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_auto(PbaLeftovers) leftovers = {0};
    g_autoptr(JsonArray) actions = json_array_new();

    if (!pba_leftovers_look(access, &block, &leftovers, error) ||
        !check_down(access, &leftovers, error)) {
        return false;
    }
    find_bitmaps(access, &block, actions, lines);
    return pba_actions_run(access->qmp, actions, error);
}

bool pba_access_forget(PbaAccess *access, GPtrArray *lines, GError **error)
{
    g_autoptr(GPtrArray) found = g_ptr_array_new_with_free_func(g_free);

    if (!pba_access_require_down(access, error)) {
        return false;
    }
    bool done = pba_access_begin(access, error) && pba_owner_mark(access, NULL, error);
    if (done) {
        done = forget_marked(access, found, error);
        /* Only our marker: those of a dead process tell recovery what to do. */
        pba_owner_unmark(access, false);
        pba_access_end(access);
    }
    if (done) {
        g_ptr_array_extend_and_steal(lines, g_steal_pointer(&found));
    }
    pba_qmp_release(access->qmp);
    return done;
}
