/* Transactions on bitmaps: QEMU does all actions or none. */
#include "qemu.h"
#include "src/qmp/qmp.h"

JsonNode *pba_bitmap_ref(const char *node, const char *bitmap)
{
    return pba_json("{'node': <%s>, 'name': <%s>}", node, bitmap);
}

void pba_actions_add(JsonArray *actions, const char *type, JsonNode *data)
{
    JsonNode *action = pba_json("{'type': <%s>}", type);

    json_object_set_member(json_node_get_object(action), "data", data);
    json_array_add_element(actions, action);
}

void pba_actions_add_ref(JsonArray *actions, const char *type, const char *node, const char *bitmap)
{
    pba_actions_add(actions, type, pba_bitmap_ref(node, bitmap));
}

void pba_actions_add_removal(JsonArray *actions, const PbaBlock *block, const char *node,
                             const char *bitmap)
{
    if (pba_block_find_bitmap(block, node, bitmap)) {
        pba_actions_add_ref(actions, "block-dirty-bitmap-remove", node, bitmap);
    }
}

void pba_actions_add_merge(JsonArray *actions, const char *node, const char *bitmap,
                           const char *from)
{
    pba_actions_add(
        actions, "block-dirty-bitmap-merge",
        pba_json("{'node': <%s>, 'target': <%s>, 'bitmaps': <[<%s>]>}", node, bitmap, from));
}

bool pba_actions_run(PbaQmp *qmp, JsonArray *actions, GError **error)
{
    return json_array_get_length(actions) == 0 ||
           pba_qmp_run(qmp, "transaction", pba_json_wrap_array("actions", json_array_ref(actions)),
                       error);
}
