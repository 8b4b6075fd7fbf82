package PVE::BackupAccess::Libvirt::Description;

# A domain's description, as libvirt prints it: attributes in single quotes, one element a line, two spaces
# for each level. What is looked for in it are a few elements and attributes, so that no XML parser is needed.

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(disks_of element_text is_running user_of);

my %entities = (lt => '<', gt => '>', amp => '&', quot => '"', apos => q('));

my sub plain ($text) {
    return $text =~ s/&(?:#x([0-9a-fA-F]+)|#([0-9]+)|(\w+));/
        defined($1) ? chr(hex($1)) : defined($2) ? chr($2) : $entities{$3} \/\/ "&$3;"/ger;
}

# The attributes of the first such element.
my sub attributes ($xml, $element) {
    my ($text) = $xml =~ m/<$element\b((?:\s+[\w:-]+='[^']*')*)\s*\/?>/ or return {};
    my %found = $text =~ m/([\w:-]+)='([^']*)'/g;
    return { map { $_ => plain($found{$_}) } keys %found };
}

# As libvirt counts targets: vda is 0, vdz 25, vdaa 26.
my sub index_of ($target) {
    my ($letters) = $target =~ m/\A[a-z]d([a-z]+)\z/ or return;
    my $index = 0;
    $index = $index * 26 + ord($_) - ord('a') + 1 for split(m//, $letters);
    return $index - 1;
}

# What libvirt calls the guest device when the domain runs; undef if that cannot be known before.
my sub device_name ($xml, $target) {
    my $alias = attributes($xml, 'alias')->{name};
    return $alias if defined($alias);
    my ($bus, $name) = $target->@{qw(bus dev)};
    if ($bus =~ m/\A(?:scsi|ide|sata|fdc)\z/) {
        my $at = attributes($xml, 'address');
        my @place = $bus eq 'scsi' ? qw(controller bus target unit) : qw(controller bus unit);
        return if grep { !defined($at->{$_}) } @place;
        return $bus . join('-', $at->@{@place});
    }
    my $index = index_of($name);
    return defined($index) ? "$bus-disk$index" : undef;
}

my sub disk_of ($type, $kind, $xml) {
    my ($outer) = $xml =~ s{<(backingStore|mirror)\b.*?</\1>}{}gsr;
    my $target = attributes($outer, 'target');
    my $source = attributes($outer, 'source');
    return {
        kind => $kind,
        type => $type,
        target => $target->{dev} // '',
        device => device_name($outer, { bus => '', dev => '', $target->%* }),
        format => attributes($outer, 'driver')->{type} // 'raw',
        file => $source->{file} // $source->{dev},
        'read-only' => $outer =~ m/<readonly\b/ ? 1 : 0,
        shareable => $outer =~ m/<shareable\b/ ? 1 : 0,
    };
}

sub disks_of ($xml) {
    my ($devices) = $xml =~ m{^  <devices>\n(.*?)^  </devices>}ms or return;
    my @disks;
    while ($devices =~ m{^    <disk\b([^>]*)>(.*?)^    </disk>}gms) {
        my ($about, $content) = ($1, $2);
        my ($type) = $about =~ m/\btype='(\w+)'/;
        my ($kind) = $about =~ m/\bdevice='(\w+)'/;
        push(@disks, disk_of($type // 'file', $kind // 'disk', $content));
    }
    return @disks;
}

# ---- the domain ----

# Of an element of the domain itself, not of a device or of other programs' metadata.
sub element_text ($xml, $element) {
    my ($text) = $xml =~ m{^  <$element>([^<]*)</$element>}m;
    return defined($text) ? plain($text) : undef;
}

# It has an ID as long as it has a QEMU, whatever state it is in.
sub is_running ($xml) { return $xml =~ m/^<domain\b[^>]*\bid='/m ? 1 : 0 }

# The user and group of QEMU, as libvirt's own access control has them: '+64055:+109', or names. A disk may
# have a label of its own, which is its file's.
sub user_of ($xml) {
    my ($label) = $xml =~ m{^  <seclabel\b[^>]*\bmodel='dac'[^>]*>\s*<label>([^<]*)</label>}m
        or return;
    my ($user, $group) = $label =~ m/\A\+?([^:]+):\+?([^:]+)\z/ or return;
    return ($user, $group);
}

1;
