/* The dirty bitmaps of the upstream backend.
 *
 * Each target has one bitmap a disk. While an access is up it is frozen, and a background bitmap
 * records what the guest writes. Bits may be too many at any moment, never too few: a bitmap that
 * cannot be trusted is removed, so that the next backup is a full one. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <string.h>

#define JOB_LIMIT_S 60

static JsonNode *action(const char *type, JsonNode *data)
{
    JsonNode *node = pba_json("{'type': <%s>}", type);
    json_object_set_member(json_node_get_object(node), "data", data);
    return node;
}

static JsonNode *bitmap_ref(const PbaDisk *disk, const char *name)
{
    return pba_json("{'node': <%s>, 'name': <%s>}", disk->bitmap_node, name);
}

static JsonNode *merge_action(const PbaDisk *disk, const char *target, JsonNode *source)
{
    JsonArray *sources = json_array_new();
    json_array_add_element(sources, source);
    JsonNode *data = pba_json("{'node': <%s>, 'target': <%s>}", disk->bitmap_node, target);
    json_object_set_array_member(json_node_get_object(data), "bitmaps", sources);
    return action("block-dirty-bitmap-merge", data);
}

static bool run_transaction(PbaAccess *access, JsonArray *actions, GError **error)
{
    return pba_qmp_run(access->qmp, "transaction", pba_json_wrap_array("actions", actions), error);
}

JsonNode *pba_bitmap_add_arguments(const PbaDisk *disk, const char *name)
{
    JsonNode *arguments = pba_json("{'node': <%s>, 'name': <%s>, 'granularity': <%u>}",
                                   disk->bitmap_node, name, PBA_GRANULARITY);
    pba_json_set_if(arguments, "persistent", disk->bitmap_persistent);
    return arguments;
}

bool pba_bitmap_remove(PbaAccess *access, const PbaDisk *disk, const char *name, GError **error)
{
    return pba_qmp_run(access->qmp, "block-dirty-bitmap-remove", bitmap_ref(disk, name), error);
}

/* The three things that make_dirty_source needs, by name. */
typedef struct {
    char *source;
    char *sink;
    char *job;
} DirtySource;

static void dirty_source_clear(DirtySource *names)
{
    g_free(names->source);
    g_free(names->sink);
    g_free(names->job);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(DirtySource, dirty_source_clear)

#define ALL_DIRTY "all-dirty"

static bool wait_job_concluded(PbaAccess *access, const char *id, GError **error)
{
    gint64 deadline = pba_deadline(JOB_LIMIT_S);
    unsigned pause_ms = 1;

    do {
        g_autoptr(JsonArray) jobs = pba_qmp_query_array(access->qmp, "query-jobs", NULL, error);
        if (!jobs) {
            return false;
        }
        const char *status = NULL;
        for (guint i = 0; i < json_array_get_length(jobs); i++) {
            JsonObject *job = pba_json_element(jobs, i);
            if (job && g_strcmp0(pba_json_find_string(job, "id"), id) == 0) {
                status = pba_json_find_string(job, "status");
            }
        }
        if (!status || g_strcmp0(status, "concluded") == 0) {
            return true;
        }
    } while (
        pba_qmp_pause(access->qmp, &pause_ms, deadline, "waiting for a backup job to end", error));
    return false;
}

/* QMP cannot set bits. But a backup job that is to keep its bitmap right whatever happens
 * (bitmap-mode always) and whose every write fails leaves all bits set. */
static bool make_dirty_source(PbaAccess *access, const PbaDisk *disk, const DirtySource *names,
                              GError **error)
{
    PbaQmp *qmp = access->qmp;
    gint64 size = (gint64)disk->size;

    return pba_qmp_run(qmp, "blockdev-add",
                       pba_json("{'driver': <'null-co'>, 'node-name': <%s>, 'size': <%x>}",
                                names->source, size),
                       error) &&
           pba_qmp_run(qmp, "block-dirty-bitmap-add",
                       pba_json("{'node': <%s>, 'name': <'" ALL_DIRTY "'>, 'granularity': <%u>}",
                                names->source, PBA_GRANULARITY),
                       error) &&
           pba_qmp_run(
               qmp, "blockdev-add",
               pba_json("{'driver': <'blkdebug'>, 'node-name': <%s>, 'image': <{'driver': "
                        "<'null-co'>, 'size': <%x>}>, 'inject-error': <[{'event': <'none'>, "
                        "'iotype': <'write'>}, {'event': <'none'>, 'iotype': "
                        "<'write-zeroes'>}]>}",
                        names->sink, size),
               error) &&
           pba_qmp_run(
               qmp, "blockdev-backup",
               pba_json("{'job-id': <%s>, 'device': <%s>, 'target': <%s>, 'sync': <'full'>, "
                        "'bitmap': <'" ALL_DIRTY "'>, 'bitmap-mode': <'always'>, "
                        "'auto-dismiss': <false>}",
                        names->job, names->source, names->sink),
               error) &&
           wait_job_concluded(access, names->job, error) &&
           pba_qmp_run(qmp, "job-dismiss", pba_json("{'id': <%s>}", names->job), error);
}

static bool all_dirty_holds(PbaAccess *access, const PbaDisk *disk, const DirtySource *names,
                            GError **error)
{
    g_auto(PbaBlock) block = {0};
    uint64_t count;

    if (!pba_block_query(access->qmp, false, &block, error)) {
        return false;
    }
    JsonObject *bitmap = pba_block_find_bitmap(&block, names->source, ALL_DIRTY);
    if (!bitmap) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the bitmap added to node '%s' is not there",
                      names->source);
    }
    if (!bitmap || !pba_json_size(bitmap, "count", &count, error)) {
        return false;
    }
    if (count < disk->size) {
        pba_error_set(error, PBA_ERROR_PROTOCOL,
                      "could not make a bitmap with every bit set: only %" G_GUINT64_FORMAT
                      " of %" G_GUINT64_FORMAT " bytes are dirty",
                      count, disk->size);
        return false;
    }
    return true;
}

static DirtySource dirty_source_names(const PbaAccess *access, const PbaDisk *disk)
{
    return (DirtySource){
        .source = pba_disk_name(access, "null", disk),
        .sink = pba_disk_name(access, "fail", disk),
        .job = pba_disk_name(access, "job", disk),
    };
}

static bool delete_node(PbaAccess *access, const char *node, GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-del", pba_json("{'node-name': <%s>}", node), error);
}

bool pba_dirty_source_drop(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                           GError **error)
{
    g_auto(DirtySource) names = dirty_source_names(access, disk);

    /* The job cannot be there without its target. */
    if (pba_block_find_node(block, names.sink)) {
        if (!wait_job_concluded(access, names.job, error)) {
            return false;
        }
        /* Fails where there is no job, or no more. */
        pba_qmp_run(access->qmp, "job-dismiss", pba_json("{'id': <%s>}", names.job), NULL);
        if (!delete_node(access, names.sink, error)) {
            return false;
        }
    }
    return !pba_block_find_node(block, names.source) || delete_node(access, names.source, error);
}

bool pba_bitmap_add_all_dirty(PbaAccess *access, PbaDisk *disk, GError **error)
{
    g_auto(DirtySource) names = dirty_source_names(access, disk);
    g_autofree char *bitmap = pba_target_bitmap(access->target_id);
    bool done = false;

    if (make_dirty_source(access, disk, &names, error) &&
        all_dirty_holds(access, disk, &names, error)) {
        /* One transaction: there is no moment at which the bitmap exists and lacks a bit. */
        JsonArray *actions = json_array_new();
        json_array_add_element(
            actions, action("block-dirty-bitmap-add", pba_bitmap_add_arguments(disk, bitmap)));
        json_array_add_element(
            actions,
            merge_action(disk, bitmap,
                         pba_json("{'node': <%s>, 'name': <'" ALL_DIRTY "'>}", names.source)));
        done = run_transaction(access, actions, error);
    }
    return done && delete_node(access, names.sink, error) &&
           delete_node(access, names.source, error);
}

static void add_join_actions(JsonArray *actions, const PbaDisk *disk, const char *target,
                             const char *background, bool success)
{
    json_array_add_element(actions, action("block-dirty-bitmap-enable", bitmap_ref(disk, target)));
    if (success) {
        json_array_add_element(actions,
                               action("block-dirty-bitmap-clear", bitmap_ref(disk, target)));
    }
    json_array_add_element(actions, merge_action(disk, target, bitmap_ref(disk, background)));
    json_array_add_element(actions,
                           action("block-dirty-bitmap-remove", bitmap_ref(disk, background)));
}

/* A bitmap that cannot be trusted. */
static bool drop_bitmap(PbaAccess *access, const PbaDisk *disk, const char *name, GError **error)
{
    if (!pba_bitmap_remove(access, disk, name, error)) {
        pba_error_add_device(error, disk->device);
        return false;
    }
    pba_log(
        &access->hooks, PBA_LOG_WARN,
        "device %s: bitmap '%s' is removed, since it may lack bits: the next backup is a full one",
        disk->device, name);
    return true;
}

/* One disk by itself, after the transaction for all has failed. The caller will be told so, and may
 * take the backup for a failed one: no bitmap loses its old bits. */
static bool join_or_drop(PbaAccess *access, const PbaDisk *disk, const char *target,
                         const char *background, GError **error)
{
    JsonArray *actions = json_array_new();

    add_join_actions(actions, disk, target, background, false);
    if (run_transaction(access, actions, error)) {
        return true;
    }
    if (error && pba_error_is_fatal(*error)) {
        return false; /* whether it was done is not known; the next setup looks */
    }
    /* A target's that stays is frozen and alone: the next setup knows it for what it is. */
    drop_bitmap(access, disk, target, NULL);
    pba_bitmap_remove(access, disk, background, NULL);
    return false;
}

static bool join_each(PbaAccess *access, GPtrArray *split, const char *target,
                      const char *background, GError **error)
{
    GError *first = NULL;

    for (guint i = 0; i < split->len && !pba_error_is_fatal(first); i++) {
        const PbaDisk *disk = split->pdata[i];
        GError *step = NULL;
        if (!join_or_drop(access, disk, target, background, &step)) {
            pba_error_add_device(&step, disk->device);
            pba_error_keep_first(&first, step, &access->hooks);
        }
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

/* As QEMU finds persistent ones that it did not store at its last end: good for removing only. */
static bool is_inconsistent(JsonObject *info)
{
    return pba_json_find_bool(info, "inconsistent");
}

/* A target's bitmap without its background one: frozen by an access that is gone, or cleared by a
 * transaction whose reply was lost. */
static bool is_doubtful(const PbaAccess *access, JsonObject *info)
{
    return access->success_unknown ||
           (!pba_json_find_bool(info, "recording") && !is_inconsistent(info));
}

bool pba_bitmaps_join(PbaAccess *access, PbaBlock *block, bool success, GError **error)
{
    g_autofree char *target = pba_target_bitmap(access->target_id);
    g_autofree char *background = pba_background_bitmap(access->target_id);
    g_autoptr(GPtrArray) split = g_ptr_array_new();
    g_autoptr(GError) joint_error = NULL;
    JsonArray *actions = json_array_new();
    GError *first = NULL;

    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        JsonObject *info = pba_block_find_bitmap(block, disk->bitmap_node, target);
        JsonObject *partner = pba_block_find_bitmap(block, disk->bitmap_node, background);
        GError *step = NULL;
        if (info && partner && (is_inconsistent(info) || is_inconsistent(partner))) {
            drop_bitmap(access, disk, target, &step);
            drop_bitmap(access, disk, background, step ? NULL : &step);
        } else if (info && partner) {
            g_ptr_array_add(split, disk);
            add_join_actions(actions, disk, target, background, success);
        } else if (partner) {
            drop_bitmap(access, disk, background, &step);
        } else if (info && is_doubtful(access, info)) {
            drop_bitmap(access, disk, target, &step);
        }
        pba_error_keep_first(&first, step, &access->hooks);
    }
    if (split->len == 0) {
        json_array_unref(actions);
    } else if (!run_transaction(access, actions, &joint_error)) {
        GError *step = NULL;
        if (pba_error_is_fatal(joint_error)) {
            /* The bitmaps may have been cleared although the caller is told of a failure. */
            access->success_unknown |= success;
            step = g_steal_pointer(&joint_error);
        } else {
            join_each(access, split, target, background, &step);
        }
        pba_error_keep_first(&first, step, &access->hooks);
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}
