/* The files that make a checkpoint a model of Hugging Face Transformers (trust_remote_code = True): configuration_iha.py
 * and modeling_iha.py, whose text the program contains, and what config.json has for them. Nothing here reads them. */
#ifndef IHA_MODEL_CHECKPOINT_TRANSFORMERS_H
#define IHA_MODEL_CHECKPOINT_TRANSFORMERS_H

#include "model/config/config.h"

/* config_model_to_json, and after its keys: architectures, auto_map, dtype, and the token ids of generation_config (the
 * text of a generation_config.json; NULL: none). malloc'd; NULL: out of memory. */
char *transformers_config_json(const struct model_config *m, const char *generation_config);

/* Write the .py files into the directory `dir`, synced. */
int transformers_write_code(const char *dir, struct error *e);

#endif
