/* bitmap.c: converts words to values and back. An unknown word is an error, never a guess. */
#include "src/pba.h"
#include "tap.h"

static const struct {
    const char *word;
    PbaBitmapMode mode;
} modes[] = {
    {"none", PBA_BITMAP_MODE_NONE},
    {"new", PBA_BITMAP_MODE_NEW},
    {"use", PBA_BITMAP_MODE_USE},
};

static const struct {
    const char *word;
    PbaBitmapAction action;
    const char *status;
} actions[] = {
    {"not-used", PBA_BITMAP_ACTION_NOT_USED, "none"},
    {"not-used-removed", PBA_BITMAP_ACTION_NOT_USED_REMOVED, "none"},
    {"new", PBA_BITMAP_ACTION_NEW, "new"},
    {"used", PBA_BITMAP_ACTION_USED, "reuse"},
    {"invalid", PBA_BITMAP_ACTION_INVALID, "new"},
    {"missing-recreated", PBA_BITMAP_ACTION_MISSING_RECREATED, "new"},
};

static const struct {
    const char *word;
    PbaBitmapStatus status;
} statuses[] = {
    {"none", PBA_BITMAP_STATUS_NONE},
    {"new", PBA_BITMAP_STATUS_NEW},
    {"reuse", PBA_BITMAP_STATUS_REUSE},
};

/* None of these is a mode, an action or a status. */
static const char *const unknown[] = {
    "",   " ",    "None",   "NEW",      "new ", " new", "newer",
    "us", "uses", "re-use", "not_used", "%s%n", "\xff",
};

static void test_known(void)
{
    for (size_t i = 0; i < G_N_ELEMENTS(modes); i++) {
        PbaBitmapMode mode;
        bool parsed = pba_bitmap_mode_parse(modes[i].word, &mode, NULL);
        ok(parsed && mode == modes[i].mode, "mode %s", modes[i].word);
        is_text(pba_bitmap_mode_name(modes[i].mode), modes[i].word, "and back");
    }
    for (size_t i = 0; i < G_N_ELEMENTS(actions); i++) {
        PbaBitmapAction action;
        bool parsed = pba_bitmap_action_parse(actions[i].word, &action, NULL);
        ok(parsed && action == actions[i].action, "action %s", actions[i].word);
        is_text(pba_bitmap_action_name(actions[i].action), actions[i].word, "and back");
        is_text(pba_bitmap_status_name(pba_bitmap_status(actions[i].action)), actions[i].status,
                "its status");
    }
    for (size_t i = 0; i < G_N_ELEMENTS(statuses); i++) {
        is_text(pba_bitmap_status_name(statuses[i].status), statuses[i].word, "status");
    }
    is_text(pba_bitmap_action_name(PBA_BITMAP_ACTION_ABSENT), NULL, "no action has no word");
    is_number(pba_bitmap_status(PBA_BITMAP_ACTION_ABSENT), PBA_BITMAP_STATUS_NONE,
              "no action is status none");
}

/* Frees the error. */
static void check_error(bool parsed, GError *error, PbaErrorCode code, const char *word)
{
    ok(!parsed && g_error_matches(error, PBA_ERROR, (int)code), "not a word: '%s'", word);
    ok(error && g_utf8_validate(error->message, -1, NULL), "its message is UTF-8");
    g_clear_error(&error);
}

static void test_unknown_word(const char *word)
{
    PbaBitmapMode mode = PBA_BITMAP_MODE_USE;
    PbaBitmapAction action = PBA_BITMAP_ACTION_INVALID;
    GError *error = NULL;

    bool parsed = pba_bitmap_mode_parse(word, &mode, &error);
    check_error(parsed, g_steal_pointer(&error), PBA_ERROR_ARGUMENT, word);
    parsed = pba_bitmap_action_parse(word, &action, &error);
    check_error(parsed, g_steal_pointer(&error), PBA_ERROR_PROTOCOL, word);
    ok(mode == PBA_BITMAP_MODE_USE && action == PBA_BITMAP_ACTION_INVALID,
       "nothing is guessed for it");
    ok(!pba_bitmap_action_parse(word, &action, NULL), "an error nobody wants to see");
}

static void test_others_words(void)
{
    PbaBitmapMode mode;
    PbaBitmapAction action;

    ok(!pba_bitmap_mode_parse("reuse", &mode, NULL), "a status is no mode");
    ok(!pba_bitmap_mode_parse("used", &mode, NULL), "an action is no mode");
    ok(!pba_bitmap_action_parse("use", &action, NULL), "a mode is no action");
    ok(!pba_bitmap_action_parse("none", &action, NULL), "a status is no action");
}

int main(void)
{
    test_known();
    for (size_t i = 0; i < G_N_ELEMENTS(unknown); i++) {
        test_unknown_word(unknown[i]);
    }
    test_others_words();
    return done_testing();
}
