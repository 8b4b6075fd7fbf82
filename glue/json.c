/* Converts JSON to plain Perl data, and back. */
#include "glue.h"

static SV *sv_from_array(pTHX_ JsonArray *array)
{
    AV *list = newAV();
    for (guint i = 0; i < json_array_get_length(array); i++) {
        av_push(list, glue_sv_from_json(aTHX_ json_array_get_element(array, i)));
    }
    return newRV_noinc((SV *)list);
}

static SV *sv_from_object(pTHX_ JsonObject *object)
{
    HV *hash = newHV();
    JsonObjectIter iter;
    const char *key;
    JsonNode *value;

    json_object_iter_init(&iter, object);
    while (json_object_iter_next(&iter, &key, &value)) {
        SV *name = sv_2mortal(glue_sv_from_text(aTHX_ key));
        (void)hv_store_ent(hash, name, glue_sv_from_json(aTHX_ value), 0);
    }
    return newRV_noinc((SV *)hash);
}

/* JSON::PP's booleans are those of core Perl, and every JSON encoder accepts them. */
static SV *sv_from_bool(pTHX_ bool value)
{
    SV *boolean = get_sv(value ? "JSON::PP::true" : "JSON::PP::false", 0);
    return boolean ? newSVsv(boolean) : newSViv(value);
}

static SV *sv_from_value(pTHX_ JsonNode *node)
{
    GType type = json_node_get_value_type(node);

    if (type == G_TYPE_BOOLEAN) {
        return sv_from_bool(aTHX_ json_node_get_boolean(node));
    }
    if (type == G_TYPE_INT64) {
        return newSViv((IV)json_node_get_int(node));
    }
    if (type == G_TYPE_STRING) {
        return glue_sv_from_text(aTHX_ json_node_get_string(node));
    }
    return newSVnv(json_node_get_double(node));
}

SV *glue_sv_from_json(pTHX_ JsonNode *node)
{
    switch (json_node_get_node_type(node)) {
    case JSON_NODE_OBJECT:
        return sv_from_object(aTHX_ json_node_get_object(node));
    case JSON_NODE_ARRAY:
        return sv_from_array(aTHX_ json_node_get_array(node));
    case JSON_NODE_VALUE:
        return sv_from_value(aTHX_ node);
    default:
        return newSV(0);
    }
}

/* values: how many more are allowed, because Perl data may contain itself. 0: no more are
 * converted. */
static JsonNode *json_from_sv(pTHX_ SV *sv, unsigned depth, unsigned *values);

static JsonNode *json_from_array(pTHX_ AV *list, unsigned depth, unsigned *values)
{
    JsonArray *array = json_array_new();
    for (SSize_t i = 0; i <= av_len(list) && *values > 0; i++) {
        SV **element = av_fetch(list, i, 0);
        json_array_add_element(
            array, json_from_sv(aTHX_ element ? *element : &PL_sv_undef, depth, values));
    }
    JsonNode *node = json_node_alloc();
    json_node_init_array(node, array);
    json_array_unref(array);
    return node;
}

static JsonNode *json_from_hash(pTHX_ HV *hash, unsigned depth, unsigned *values)
{
    JsonObject *object = json_object_new();
    HE *entry;

    hv_iterinit(hash);
    while ((entry = hv_iternext(hash)) && *values > 0) {
        SV *key = hv_iterkeysv(entry);
        json_object_set_member(object, SvPVutf8_nolen(key),
                               json_from_sv(aTHX_ hv_iterval(hash, entry), depth, values));
    }
    JsonNode *node = json_node_alloc();
    json_node_init_object(node, object);
    json_object_unref(object);
    return node;
}

static JsonNode *json_from_scalar(pTHX_ SV *sv)
{
    JsonNode *node = json_node_alloc();

    if (!SvOK(sv)) {
        return json_node_init_null(node);
    }
#ifdef SvIsBOOL
    if (SvIsBOOL(sv)) {
        return json_node_init_boolean(node, SvTRUE(sv));
    }
#endif
    if (SvPOK(sv) && !SvIOK(sv)) {
        STRLEN length;
        const char *text = SvPVutf8(sv, length);
        g_autofree char *valid = g_utf8_make_valid(text, (gssize)length);
        return json_node_init_string(node, valid);
    }
    if (SvNOK(sv) && !SvIOK(sv)) {
        return json_node_init_double(node, SvNV(sv));
    }
    return json_node_init_int(node, SvIV(sv));
}

static JsonNode *json_from_sv(pTHX_ SV *sv, unsigned depth, unsigned *values)
{
    if (depth > PBA_QMP_MAX_DEPTH) {
        *values = 0;
    }
    if (*values == 0) {
        return json_node_init_null(json_node_alloc());
    }
    --*values;
    if (!SvROK(sv)) {
        return json_from_scalar(aTHX_ sv);
    }
    SV *referent = SvRV(sv);
    if (SvTYPE(referent) == SVt_PVAV) {
        AV *list = (AV *)referent;
        return json_from_array(aTHX_ list, depth + 1, values);
    }
    if (SvTYPE(referent) == SVt_PVHV) {
        HV *hash = (HV *)referent;
        return json_from_hash(aTHX_ hash, depth + 1, values);
    }
    /* \1, \0 and the boolean objects of all JSON decoders are references to a number. */
    return json_node_init_boolean(json_node_alloc(), SvTRUE(referent));
}

JsonNode *glue_json_from_sv(pTHX_ SV *sv, GError **error)
{
    unsigned values = PBA_QMP_MAX_VALUES;
    JsonNode *node = json_from_sv(aTHX_ sv, 0, &values);

    if (values == 0) {
        json_node_unref(node);
        g_set_error(error, PBA_ERROR, PBA_ERROR_PROTOCOL,
                    "the data has over %u values, or is nested deeper than %d", PBA_QMP_MAX_VALUES,
                    PBA_QMP_MAX_DEPTH);
        return NULL;
    }
    return node;
}
