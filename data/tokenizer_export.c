#include "data/tokenizer_export.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_internal.h"

enum { BYTE_END = 256 };

/* ---- tokenizer.json of the byte tokenizer ---- */

static bool add_end_token(cJSON *root) {
    cJSON *tokens = cJSON_AddArrayToObject(root, "added_tokens"), *token = cJSON_CreateObject();
    bool ok = tokens && cJSON_AddItemToArray(tokens, token);
    if (!ok) {
        cJSON_Delete(token);
        return false;
    }
    static const char *const off[] = {"single_word", "lstrip", "rstrip", "normalized"};
    ok = cJSON_AddNumberToObject(token, "id", BYTE_END) &&
         cJSON_AddStringToObject(token, "content", end_of_text_names[0]);
    for (size_t i = 0; i < sizeof off / sizeof *off && ok; i++)
        ok = cJSON_AddFalseToObject(token, off[i]);
    return ok && cJSON_AddTrueToObject(token, "special");
}

/* The step that writes bytes as printable characters, or back, without cutting the text into words. */
static bool add_byte_level(cJSON *root, const char *name) {
    cJSON *step = cJSON_AddObjectToObject(root, name);
    return step && cJSON_AddStringToObject(step, "type", "ByteLevel") &&
           cJSON_AddFalseToObject(step, "add_prefix_space") && cJSON_AddTrueToObject(step, "trim_offsets") &&
           cJSON_AddFalseToObject(step, "use_regex");
}

static bool add_bpe(cJSON *root) {
    static const char *const none[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                       "end_of_word_suffix"};
    static const char *const off[] = {"fuse_unk", "byte_fallback", "ignore_merges"};
    cJSON *model = cJSON_AddObjectToObject(root, "model");
    bool ok = model && cJSON_AddStringToObject(model, "type", "BPE");
    for (size_t i = 0; i < sizeof none / sizeof *none && ok; i++)
        ok = cJSON_AddNullToObject(model, none[i]);
    for (size_t i = 0; i < sizeof off / sizeof *off && ok; i++)
        ok = cJSON_AddFalseToObject(model, off[i]);
    cJSON *vocab = ok ? cJSON_AddObjectToObject(model, "vocab") : NULL;
    for (int byte = 0; byte < 256 && vocab; byte++) {
        char name[4] = "";
        name[byte_character((unsigned char)byte, name)] = '\0';
        if (!cJSON_AddNumberToObject(vocab, name, byte))
            return false;
    }
    return vocab && cJSON_AddArrayToObject(model, "merges");
}

char *tokenizer_bytes_json(void) {
    cJSON *root = cJSON_CreateObject();
    bool ok = root && cJSON_AddStringToObject(root, "version", "1.0") &&
              cJSON_AddNullToObject(root, "truncation") && cJSON_AddNullToObject(root, "padding") &&
              add_end_token(root) && cJSON_AddNullToObject(root, "normalizer") &&
              add_byte_level(root, "pre_tokenizer") && cJSON_AddNullToObject(root, "post_processor") &&
              add_byte_level(root, "decoder") && add_bpe(root);
    char *text = ok ? cJSON_PrintUnformatted(root) : NULL;
    cJSON_Delete(root);
    return text;
}

/* ---- tokenizer_config.json ---- */

/* The text of the added token with this id, in *tokens, or NULL. */
static const char *added_token(const cJSON *tokenizer, int32_t id) {
    const cJSON *tokens = json_member(tokenizer, "added_tokens");
    for (const cJSON *token = cJSON_IsArray(tokens) ? tokens->child : NULL; token; token = token->next) {
        const cJSON *number = json_member(token, "id");
        if (cJSON_IsNumber(number) && number->valueint == id)
            return cJSON_GetStringValue(json_member(token, "content"));
    }
    return NULL;
}

static bool set(cJSON *root, const char *name, cJSON *value) {
    cJSON_DeleteItemFromObjectCaseSensitive(root, name);
    bool ok = value && cJSON_AddItemToObject(root, name, value);
    if (!ok)
        cJSON_Delete(value);
    return ok;
}

static bool complete_config(cJSON *root, const cJSON *tokenizer, int32_t end, int64_t max_tokens) {
    static const char *const roles[] = {"bos_token", "eos_token", "pad_token"};
    const char *token = added_token(tokenizer, end);
    cJSON_DeleteItemFromObjectCaseSensitive(root, "auto_map");
    bool ok = set(root, "tokenizer_class", cJSON_CreateString("PreTrainedTokenizerFast"));
    for (size_t i = 0; i < sizeof roles / sizeof *roles && ok; i++)
        if (token && !json_member(root, roles[i]))
            ok = set(root, roles[i], cJSON_CreateString(token));
    if (ok && !json_member(root, "model_max_length"))
        ok = set(root, "model_max_length", cJSON_CreateNumber((double)max_tokens));
    return ok;
}

char *tokenizer_config_json(const char *path, const char *text, int32_t end, int64_t max_tokens,
                            struct error *e) {
    cJSON *root = NULL, *tokenizer = cJSON_Parse(text);
    if (path && read_tokenizer_config(path, &root, e) != 0) {
        cJSON_Delete(tokenizer);
        return NULL;
    }
    if (!root)
        root = cJSON_CreateObject();
    bool ok = root && tokenizer && complete_config(root, tokenizer, end, max_tokens);
    char *config = ok ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    cJSON_Delete(tokenizer);
    if (!config)
        fail_run(e, "out of memory for a checkpoint's tokenizer_config.json");
    return config;
}
