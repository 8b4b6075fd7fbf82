# The gate that enforces the floors of src/: it finds each kind of violation, and none in the current sources.
# One QEMU is enough: none is started.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::House qw(broken_rules definitions);
use PBA::Test::Sources qw(lines_of source_files);

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

my %house = map { $_ => content($_) } source_files('src/*.[ch]', 'glue/*.[ch]', '*.xs');
cmp_ok(scalar(keys(%house)), '>', 50, 'the sources are looked at');
is_deeply([broken_rules(\%house)], [], 'the house stands');

# Adds a line to a file, and checks the message.
sub breaks ($file, $line, $rule, $what) {
    ok(exists($house{$file}), "$file exists");
    my %broken = (%house, $file => "$line\n$house{$file}");
    my @broken = broken_rules(\%broken);
    is(scalar(@broken), 1, "$what: found once") or diag(@broken);
    like($broken[0] // '', qr/\A\Q$file\E includes \S+: .*\Q$rule\E/, "$what: the rule is named");
    return;
}

sub include ($header) { return qq(#include "$header") }

breaks('src/base/wait.c', include('src/qmp/qmp.h'), 'lower floors only', 'up the stairs');
breaks('src/base/wait.c', $_, 'lower floors only', "up, written $_")
    for '#include "../qmp/qmp.h"', '#include <src/qmp/qmp.h>', '# include "src/qmp/qmp.h"',
    '#include"./../qmp/qmp.h"', '#include "src/base/.././/qmp/qmp.h"', '%:include "src/qmp/qmp.h"',
    qq(#include \\\n"src/qmp/qmp.h"), '/* why */ #include /* not */ "src/qmp/qmp.h"';
breaks(
    'src/access/setup.c', include('src/access/pve/pve.h'),
    'lower floors only', 'a backend by its name'
);
breaks(
    'src/volume/map.c', include('src/qemu/qemu.h'),
    'lower floors only', 'a header of the floor above'
);
breaks('src/volume/map.c', include('src/qmp/qmp.h'), 'do not know each other', 'next door');
breaks('src/copy/copy.c', include('src/qemu/qemu.h'), 'do not know each other', 'copy and qemu');
breaks('src/qemu/block.c', include('src/access/access.h'), 'nobody but access/', 'the old circle');
breaks('src/copy/loop.c', include('src/volume/nbd.h'), 'volume/volume.h only', 'a private header');
breaks('src/access/vfile.c', include('src/vfile/server.h'), 'no header for others', 'a program');
breaks(
    'src/access/backend.c',
    include('src/access/upstream/nodes.h'),
    'upstream.h only',
    "a backend's own"
);
breaks(
    'src/access/pve/setup.c', include('src/access/upstream/upstream.h'),
    'do not know each other', 'a header of the other backend'
);
breaks('src/qmp/qmp.c', include('src/cellar/cellar.h'), 'no folder', 'a folder without a floor');
breaks('glue/hash.c', include('src/qmp/qmp.h'), 'src/pba.h only', 'glue below the face');

subtest 'includes that no gate can read' => sub {
    for my $line (
        '#include PBA_QMP',
        '#include_next "src/qmp/qmp.h"',
        '#import "src/qmp/qmp.h"',
        '#include "/src/qmp/qmp.h"'
        )
    {
        my %broken = (%house, 'src/base/wait.c' => "$line\n$house{'src/base/wait.c'}");
        like(join("\n", broken_rules(\%broken)), qr{\Asrc/base/wait\.c: an include must be}, $line);
    }
};

# Appends text to files, and checks all messages.
sub breaks_with ($what, $more, @expected) {
    my %broken = (%house, map { $_ => $house{$_} . $more->{$_} } keys($more->%*));
    is_deeply([broken_rules(\%broken)], \@expected, $what);
    return;
}

subtest 'names without a header' => sub {
    my $up = 'a file knows its own folder and lower floors only';
    breaks_with(
        'an inline function of a header', { 'src/base/base.h' => <<~'END' },
        static inline void free_it(PbaQmp *qmp) { pba_qmp_free(qmp); }
        END
        "src/base/base.h calls src/qmp/qmp.c: $up"
    );
    breaks_with(
        'a macro of a header', { 'src/qmp/qmp.h' => <<~'END' },
        #define FREE(block) pba_block_clear(block)
        END
        "src/qmp/qmp.h calls src/qemu/block.c: $up"
    );
    breaks_with(
        'a variable',
        {
            'src/base/wait.c' => "int pba_count;\n",
            'src/copy/copy.c' => "extern int pba_count;\n",
        },
        'src/copy/copy.c declares pba_count: that is for a header'
    );
    breaks_with(
        'an array',
        {
            'src/qemu/names.c' => "const char *const pba_words[] = {0};\n",
            'src/copy/copy.c' => "const void *pba_word = pba_words;\n",
        },
        'src/copy/copy.c calls src/qemu/names.c: copy/ and qemu/ stand on one floor and do not'
            . ' know each other'
    );
};

subtest 'names of glue, and others' => sub {
    breaks_with(
        'a function of glue/',
        { 'glue/hash.c' => "char *pba_short_hash(const char *text);\n" },
        'glue/hash.c names pba_short_hash: src/pba.h does not',
        'glue/hash.c declares pba_short_hash: that is for a header'
    );
    breaks_with(
        'a name that tells no floor',
        { 'src/base/wait.c' => "void other_name(void)\n{\n}\n" },
        'src/base/wait.c defines other_name: what others may call begins with pba_'
    );
};

# The names that the gate finds in a file are those that the compiler exports.
subtest 'names as the linker has them' => sub {
    my $count = 0;
    for my $file (sort grep { m{\Asrc/.*\.c\z} } keys(%house)) {
        my $object = $file =~ s/c\z/o/r;
        my @linked = map { (split)[2] } lines_of('nm', '--defined-only', '--extern-only', $object);
        my %seen = map { $_ => 1 } definitions($house{$file}),
            'pba_error_quark';    # defined by a macro
        my @unseen = grep { !$seen{$_} && !m/\A__/ } @linked;
        is("@unseen", '', $file) if @unseen;
        $count += @linked;
    }
    cmp_ok($count, '>', 200, "$count names, all are seen");
};

subtest 'a call without a header' => sub {
    my %calls = (%house,
        'src/volume/map.c' => "$house{'src/volume/map.c'}void *pba_x = pba_qmp_free;\n",);
    is_deeply(
        [broken_rules(\%calls)],
        [
            'src/volume/map.c calls src/qmp/qmp.c: volume/ and qmp/ stand on one floor and do not'
                . ' know each other'
        ],
        'the folder next door'
    );
};

subtest 'cycles of files' => sub {
    my %circle = (
        %house,
        'src/base/socket.c' => $house{'src/base/socket.c'}
            . "void pba_round(void)\n{\n    pba_wait_ms(1, 0, NULL, NULL, NULL);\n}\n",
        'src/base/wait.c' => $house{'src/base/wait.c'}
            . "void pba_about(void)\n{\n    pba_round();\n}\n",
    );
    like(
        join('', broken_rules(\%circle)),
        qr{\Asrc/base/socket\.c src/base/wait\.c: .*circle\z},
        'two functions'
    );
    my %comment
        = (%house, 'src/base/error.c' => "$house{'src/base/error.c'}/* as pba_wait_ms does */\n",);
    is_deeply([broken_rules(\%comment)], [], 'a comment calls nobody');
    my %table = (
        %house,
        'src/base/error.c' => "$house{'src/base/error.c'}const Table pba_table = {pba_wait_ms};\n",
    );
    like(join('', broken_rules(\%table)), qr{error\.c \S+wait\.c: .*circle},
        'a table of functions');
};

done_testing();
