#include "qmp.h"

#include "src/base/base.h"

JsonNode *pba_json(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autoptr(GVariant) variant = g_variant_ref_sink(g_variant_new_parsed_va(format, &args));
    va_end(args);
    return json_gvariant_serialize(variant);
}

void pba_json_set_if(JsonNode *object, const char *key, bool value)
{
    if (value) {
        json_object_set_boolean_member(json_node_get_object(object), key, TRUE);
    }
}

JsonNode *pba_json_wrap_array(const char *key, JsonArray *array)
{
    JsonObject *object = json_object_new();
    json_object_set_array_member(object, key, array);
    JsonNode *node = json_node_alloc();
    json_node_init_object(node, object);
    json_object_unref(object);
    return node;
}

static void set_member_error(GError **error, const char *key, const char *type)
{
    pba_error_set(error, PBA_ERROR_PROTOCOL, "QEMU's reply has no %s '%s'", type, key);
}

static JsonNode *find_member(JsonObject *object, const char *key, JsonNodeType type)
{
    JsonNode *node = json_object_get_member(object, key);
    return node && json_node_get_node_type(node) == type ? node : NULL;
}

const char *pba_json_find_string(JsonObject *object, const char *key)
{
    JsonNode *node = find_member(object, key, JSON_NODE_VALUE);
    return node && json_node_get_value_type(node) == G_TYPE_STRING ? json_node_get_string(node)
                                                                   : NULL;
}

bool pba_json_find_bool(JsonObject *object, const char *key)
{
    JsonNode *node = find_member(object, key, JSON_NODE_VALUE);
    return node && json_node_get_value_type(node) == G_TYPE_BOOLEAN && json_node_get_boolean(node);
}

JsonArray *pba_json_find_array(JsonObject *object, const char *key)
{
    JsonNode *node = find_member(object, key, JSON_NODE_ARRAY);
    return node ? json_node_get_array(node) : NULL;
}

JsonObject *pba_json_find_object(JsonObject *object, const char *key)
{
    JsonNode *node = find_member(object, key, JSON_NODE_OBJECT);
    return node ? json_node_get_object(node) : NULL;
}

JsonObject *pba_json_element(JsonArray *array, guint index)
{
    JsonNode *node = json_array_get_element(array, index);
    return JSON_NODE_HOLDS_OBJECT(node) ? json_node_get_object(node) : NULL;
}

JsonObject *pba_json_find_element(JsonArray *array, const char *key, const char *value)
{
    for (guint i = 0; i < json_array_get_length(array); i++) {
        JsonObject *object = pba_json_element(array, i);
        if (object && g_strcmp0(pba_json_find_string(object, key), value) == 0) {
            return object;
        }
    }
    return NULL;
}

const char *pba_json_string(JsonObject *object, const char *key, GError **error)
{
    const char *value = pba_json_find_string(object, key);
    if (!value) {
        set_member_error(error, key, "string");
    }
    return value;
}

bool pba_json_size(JsonObject *object, const char *key, uint64_t *value, GError **error)
{
    JsonNode *node = find_member(object, key, JSON_NODE_VALUE);
    bool is_integer = node && json_node_get_value_type(node) == G_TYPE_INT64;
    gint64 size = is_integer ? json_node_get_int(node) : -1;

    /* json-glib 1.10 turns larger numbers into the largest one, which no size in QEMU can have;
     * older versions turn them into negative numbers. */
    if (size < 0 || size == G_MAXINT64) {
        set_member_error(error, key, "size");
        return false;
    }
    *value = (uint64_t)size;
    return true;
}

JsonObject *pba_json_object(JsonObject *object, const char *key, GError **error)
{
    JsonObject *value = pba_json_find_object(object, key);
    if (!value) {
        set_member_error(error, key, "object");
    }
    return value;
}
