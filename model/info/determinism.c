/* What system.deterministic costs. */
#include "model/info/determinism.h"

enum { LAYER_KINDS = LAYER_IHA_LOCAL + 1 };

void determinism_print(FILE *out, const struct model *m) {
    bool seen[LAYER_KINDS] = {false};
    size_t most = 0;
    if (!m->k->attention_backend)
        return;
    fprintf(out, "deterministic: attention");
    for (int layer = 0; layer < m->config.num_hidden_layers; layer++) {
        enum layer_type type = m->config.layer_types[layer];
        size_t bytes;
        if (seen[type])
            continue;
        const char *by = m->k->attention_backend(m->dev, &m->specs[layer].attention, &bytes);
        bool first = !seen[0] && !seen[1] && !seen[2] && !seen[3];
        fprintf(out, "%s of %s layers by %s", first ? "" : ",", layer_type_name(type), by);
        if (bytes > 0)
            fprintf(out, " with %.1f MB", (double)bytes / 1e6);
        seen[type] = true;
        most = bytes > most ? bytes : most; /* one workspace serves all */
    }
    fprintf(out, "; %.1f MB of the workspace are for that\n", (double)most / 1e6);
    if (m->comm->ranks > 1)
        fprintf(out, "deterministic: gradients are summed in rank order, with %.1f MB for messages\n",
                (double)m->plan.messages / 1e6);
}
