/* The dirty bitmaps of a stock QEMU, and how a bitmap gets every bit set.
 *
 * Each target has one bitmap for each disk. While an access is active, it is frozen, and a
 * background bitmap records the guest's writes; join.c ends that. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <string.h>

#define JOB_LIMIT_S 60

void pba_bitmap_add_merge(JsonArray *actions, const PbaDisk *disk, const char *target,
                          JsonArray *sources)
{
    JsonNode *data = pba_json("{'node': <%s>, 'target': <%s>}", disk->bitmap_node, target);

    json_object_set_array_member(json_node_get_object(data), "bitmaps", sources);
    pba_actions_add(actions, "block-dirty-bitmap-merge", data);
}

JsonNode *pba_bitmap_add_arguments(const PbaDisk *disk, const char *name)
{
    JsonNode *arguments = pba_json("{'node': <%s>, 'name': <%s>, 'granularity': <%u>}",
                                   disk->bitmap_node, name, PBA_GRANULARITY);
    pba_json_set_if(arguments, "persistent", pba_upstream_disk(disk)->persistent);
    return arguments;
}

bool pba_bitmap_remove(PbaAccess *access, const PbaDisk *disk, const char *name, GError **error)
{
    return pba_qmp_run(access->qmp, "block-dirty-bitmap-remove",
                       pba_bitmap_ref(disk->bitmap_node, name), error);
}

void pba_bitmap_removals(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                         const PbaBlock *block, const char *name)
{
    pba_actions_add_removal(actions, block, disk->bitmap_node, name);
    if (pba_is_tied_bitmap(name)) {
        pba_companion_remove(actions, block, disk->bitmap_node, access->target_id);
    }
}

bool pba_bitmap_drop(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                     const char *name, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    if (!pba_is_tied_bitmap(name)) {
        return !pba_block_find_bitmap(block, disk->bitmap_node, name) ||
               pba_bitmap_remove(access, disk, name, error);
    }
    pba_bitmap_removals(actions, access, disk, block, name);
    return pba_actions_run(access->qmp, actions, error);
}

/* The names of the three objects that make_dirty_source needs. */
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
        JsonObject *job = pba_json_find_element(jobs, "id", id);
        const char *status = job ? pba_json_find_string(job, "status") : NULL;
        if (!status || g_strcmp0(status, "concluded") == 0) {
            return true;
        }
    } while (
        pba_qmp_pause(access->qmp, &pause_ms, deadline, "waiting for a backup job to end", error));
    return false;
}

/* No QMP command (7.2 to 11.0) sets bits. A backup job with sync=full and bitmap-mode=always whose
 * target fails every write leaves all bits set. */
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

bool pba_dirty_source_drop(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                           GError **error)
{
    g_auto(DirtySource) names = dirty_source_names(access, disk);

    /* The job cannot exist without its target. */
    if (pba_block_find_node(block, names.sink)) {
        if (!wait_job_concluded(access, names.job, error)) {
            return false;
        }
        /* Fails if there is no job, or if the job no longer exists. */
        pba_qmp_run(access->qmp, "job-dismiss", pba_json("{'id': <%s>}", names.job), NULL);
        if (!pba_node_delete(access, names.sink, error)) {
            return false;
        }
    }
    return !pba_block_find_node(block, names.source) ||
           pba_node_delete(access, names.source, error);
}

/* Action of a transaction: adds the companion of a new bitmap, without an ID. */
static void add_open_companion(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                               const char *bitmap)
{
    PbaCompanion open = pba_disk_companion(access, disk, access->nonce);
    g_autofree char *name = pba_companion_name(&open);

    pba_companion_add(actions, disk->bitmap_node, name, bitmap, PBA_GRANULARITY,
                      pba_upstream_disk(disk)->persistent);
}

bool pba_bitmap_add_all_dirty(PbaAccess *access, PbaDisk *disk, GError **error)
{
    g_auto(DirtySource) names = dirty_source_names(access, disk);
    g_autofree char *bitmap = pba_access_bitmap(access);
    bool done = false;

    if (make_dirty_source(access, disk, &names, error) &&
        all_dirty_holds(access, disk, &names, error)) {
        /* One transaction: at no moment does the bitmap exist and lack a bit. */
        g_autoptr(JsonArray) actions = json_array_new();
        JsonArray *sources = json_array_new();
        json_array_add_element(sources, pba_bitmap_ref(names.source, ALL_DIRTY));
        pba_actions_add(actions, "block-dirty-bitmap-add", pba_bitmap_add_arguments(disk, bitmap));
        pba_bitmap_add_merge(actions, disk, bitmap, sources);
        if (access->tied == PBA_TIED_YES) {
            add_open_companion(actions, access, disk, bitmap);
        }
        done = pba_actions_run(access->qmp, actions, error);
    }
    /* The sink first: its node shows teardown that there may be a job. */
    return done && pba_node_delete(access, names.sink, error) &&
           pba_node_delete(access, names.source, error);
}
