/* The file of choices: read whole, replaced whole by a rename. */
#include "kernels/cuda/plan_file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <map>
#include <string>

#include "kernels/hash.h"

static const char MAGIC[] = "iha.c plans 1\n", CHECKSUM[] = "checksum ";

struct plan_file {
    std::string path, machine;
    std::map<std::string, std::string> choices;
    bool changed;
};

static std::string last_line(const std::string &text) {
    char line[64];
    snprintf(line, sizeof line, "%s%016" PRIx64 "\n", CHECKSUM, fnv1a(FNV1A_START, text.data(), text.size()));
    return line;
}

/* What is wrong with the text; NULL: nothing, and its choices have been taken. */
static const char *parse(struct plan_file *file, const std::string &text) {
    if (text.compare(0, sizeof MAGIC - 1, MAGIC) != 0)
        return "it is no file of plans of this version";
    size_t end = text.rfind(CHECKSUM), at = sizeof MAGIC - 1;
    if (end == std::string::npos || text.substr(end) != last_line(text.substr(0, end)))
        return "it is damaged";
    size_t next = text.find('\n', at);
    if (text.substr(at, next - at) != file->machine)
        return "it was written on another GPU or with other libraries";
    for (at = next + 1; at < end; at = next + 1) {
        next = text.find('\n', at);
        size_t equals = text.find(" = ", at);
        file->choices[text.substr(at, equals - at)] = text.substr(equals + 3, next - equals - 3);
    }
    return NULL;
}

/* All of it; false with errno. */
static bool read_text(const char *path, std::string *text) {
    FILE *f = fopen(path, "r");
    if (!f)
        return false;
    char part[4096];
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;)
        text->append(part, n);
    int error = ferror(f) ? errno : 0;
    fclose(f);
    errno = error;
    return error == 0;
}

struct plan_file *plan_file_open(const char *path, const char *machine) {
    if (!path)
        return NULL;
    struct plan_file *file = new plan_file{path, machine, {}, false};
    std::string text;
    const char *why = NULL;
    if (read_text(path, &text))
        why = parse(file, text);
    else if (errno != ENOENT)
        why = strerror(errno);
    if (why)
        fprintf(stderr, "warning: %s is ignored: %s; the fastest algorithms are chosen again\n", path, why);
    return file;
}

const char *plan_file_find(const struct plan_file *file, const char *what) {
    if (!file)
        return NULL;
    auto found = file->choices.find(what);
    return found == file->choices.end() ? NULL : found->second.c_str();
}

void plan_file_add(struct plan_file *file, const char *what, const char *choice) {
    if (!file)
        return;
    file->choices[what] = choice;
    file->changed = true;
}

/* 0, or the errno. */
static int write_text(const char *path, const std::string &text) {
    FILE *f = fopen(path, "w");
    if (!f)
        return errno;
    bool written =
        fwrite(text.data(), 1, text.size(), f) == text.size() && fflush(f) == 0 && fsync(fileno(f)) == 0;
    int error = written ? 0 : errno;
    if (fclose(f) != 0 && !error)
        error = errno;
    return error;
}

void plan_file_save(struct plan_file *file) {
    if (!file || !file->changed)
        return;
    std::string text = MAGIC + file->machine + '\n', temporary = file->path + ".tmp";
    for (const auto &[what, choice] : file->choices)
        text += what + " = " + choice + '\n';
    text += last_line(text);
    int error = write_text(temporary.c_str(), text);
    if (error == 0 && rename(temporary.c_str(), file->path.c_str()) != 0)
        error = errno;
    file->changed = false;
    if (error == 0)
        return;
    unlink(temporary.c_str());
    fprintf(
        stderr,
        "warning: %s: cannot write: %s; when the run is resumed, the fastest algorithms are chosen again\n",
        file->path.c_str(), strerror(error));
}

void plan_file_close(struct plan_file *file) {
    delete file;
}
