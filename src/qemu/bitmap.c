/* Bitmap modes, actions and statuses: converts words to values and back. Pure. */
#include "src/base/base.h"

static const char *const mode_names[] = {
    [PBA_BITMAP_MODE_NONE] = "none",
    [PBA_BITMAP_MODE_NEW] = "new",
    [PBA_BITMAP_MODE_USE] = "use",
};

static const char *const action_names[] = {
    [PBA_BITMAP_ACTION_ABSENT] = NULL,
    [PBA_BITMAP_ACTION_NOT_USED] = "not-used",
    [PBA_BITMAP_ACTION_NOT_USED_REMOVED] = "not-used-removed",
    [PBA_BITMAP_ACTION_NEW] = "new",
    [PBA_BITMAP_ACTION_USED] = "used",
    [PBA_BITMAP_ACTION_INVALID] = "invalid",
    [PBA_BITMAP_ACTION_MISSING_RECREATED] = "missing-recreated",
};

static const char *const status_names[] = {
    [PBA_BITMAP_STATUS_NONE] = "none",
    [PBA_BITMAP_STATUS_NEW] = "new",
    [PBA_BITMAP_STATUS_REUSE] = "reuse",
};

static int find_word(const char *const *names, size_t count, const char *word)
{
    for (size_t i = 0; i < count; i++) {
        if (g_strcmp0(names[i], word) == 0) {
            return (int)i;
        }
    }
    return -1;
}

bool pba_bitmap_mode_parse(const char *word, PbaBitmapMode *mode, GError **error)
{
    int value = find_word(mode_names, G_N_ELEMENTS(mode_names), word);
    if (value < 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "unknown bitmap mode '%s' - must be one of none, new, use", word);
        return false;
    }
    *mode = (PbaBitmapMode)value;
    return true;
}

bool pba_bitmap_action_parse(const char *word, PbaBitmapAction *action, GError **error)
{
    int value = find_word(action_names, G_N_ELEMENTS(action_names), word);
    if (value < 0) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "unknown bitmap action '%s' in QEMU's reply",
                      word);
        return false;
    }
    *action = (PbaBitmapAction)value;
    return true;
}

const char *pba_bitmap_mode_name(PbaBitmapMode mode)
{
    return mode_names[mode];
}

const char *pba_bitmap_action_name(PbaBitmapAction action)
{
    return action_names[action];
}

const char *pba_bitmap_status_name(PbaBitmapStatus status)
{
    return status_names[status];
}

PbaBitmapStatus pba_bitmap_status(PbaBitmapAction action)
{
    switch (action) {
    case PBA_BITMAP_ACTION_ABSENT:
    case PBA_BITMAP_ACTION_NOT_USED:
    case PBA_BITMAP_ACTION_NOT_USED_REMOVED:
        return PBA_BITMAP_STATUS_NONE;
    case PBA_BITMAP_ACTION_USED:
        return PBA_BITMAP_STATUS_REUSE;
    case PBA_BITMAP_ACTION_NEW:
    case PBA_BITMAP_ACTION_INVALID:
    case PBA_BITMAP_ACTION_MISSING_RECREATED:
        return PBA_BITMAP_STATUS_NEW;
    }
    g_assert_not_reached();
}
